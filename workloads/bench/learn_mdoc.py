"""Lines of mdoc(7), where macros stand within the lines of other macros."""

from __future__ import annotations

from typing import Final

_AROUND: Final = {
    "Op": ("[", "]"),
    "Aq": ("<", ">"),
    "Bq": ("[", "]"),
    "Brq": ("{", "}"),
    "Dq": ("“", "”"),
    "Pq": ("(", ")"),
    "Qq": ('"', '"'),
    "Sq": ("‘", "’"),
    "Ql": ("‘", "’"),
}
"""Macros that put something around all that follows."""
_OPENING: Final = {"Oo": "[", "Po": "(", "Ao": "<", "Do": "“", "Bo": "[", "Qo": '"', "So": "‘", "Bro": "{"}
_CLOSING: Final = {"Oc": "]", "Pc": ")", "Ac": ">", "Dc": "”", "Bc": "]", "Qc": '"', "Sc": "’", "Brc": "}"}
# Each stands for its words, or for nothing.
_WORDS: Final = (
    "Ad", "An", "Ar", "At", "Bsx", "Bx", "Cd", "Cm", "Dv", "Em", "Er", "Ev", "Fa", "Fc", "Fn", "Fo", "Ft", "Fx",
    "Ic", "In", "Lb", "Li", "Lk", "Ms", "Mt", "Nd", "No", "Nx", "Ot", "Ox", "Pa", "Pf", "Sm", "St", "Sx", "Sy",
    "Tn", "Ux", "Va", "Vt", "Xc", "Xo", "Eq",
)  # fmt: skip
MDOC: Final = frozenset((*_WORDS, *_AROUND, *_OPENING, *_CLOSING, "Fl", "Nm", "Ns", "Xr"))
"""Macros that begin a line of text, or stand within one."""
_PUNCTUATION: Final = frozenset(".,:;?!)]|")


def mdoc_line(words: list[str], page: str) -> str:
    """The text of a line: macros (the first word is one) and their words. `page` is what `Nm` alone stands for."""
    line, close = "", ""
    glued = True
    """The next word follows without a space."""
    macro = ""

    def add(word: str) -> None:
        nonlocal line
        line += word if glued else f" {word}"

    for at, word in enumerate(words):
        following = words[at + 1] if at + 1 < len(words) else ""
        if word in MDOC:
            macro = word
            if word == "Ns":
                glued = True
            elif word in _AROUND:
                add(_AROUND[word][0])
                close, glued = _AROUND[word][1] + close, True
            elif word in _OPENING:
                add(_OPENING[word])
                glued = True
            elif word in _CLOSING:
                line, glued = line + _CLOSING[word], False
            elif (
                alone := {"Nm": page, "Fl": "-"}.get(word)
                if not following or following in _PUNCTUATION
                else None
            ):
                add(alone)
                glued = False
            continue
        if word in _PUNCTUATION:
            line += word
        elif macro == "Xr" and word[:1].isdigit():
            line += f"({word})"
        else:
            add(f"-{word}" if macro == "Fl" else word)
        glued = macro == "Pf"
    return line + close
