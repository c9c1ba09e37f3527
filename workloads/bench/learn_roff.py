"""Man pages as plain text: the macros of man(7) and mdoc(7), and the escapes of groff_char(7) that pages use.

Paragraphs become lines, filled by nobody, so that no line width and no hyphens are in the text.
"""

from __future__ import annotations

import re
from typing import Final
from unicodedata import normalize

from workloads.bench.learn_mdoc import MDOC, mdoc_line

_CHARACTERS: Final = {
    "em": "—", "en": "–", "hy": "-", "bu": "•", "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’",
    "co": "©", "rg": "®", "tm": "™", "mu": "×", "+-": "±", "<=": "≤", ">=": "≥", "!=": "≠", "==": "≡", "->": "→",
    "<-": "←", "ha": "^", "ti": "~", "rs": "\\", "bv": "|", "ba": "|", "br": "|", "sc": "§", "Fo": "«", "Fc": "»",
    "fo": "‹", "fc": "›", "de": "°", "ss": "ß", "ga": "`", "aa": "´", "at": "@", "sh": "#", "Do": "$", "Eu": "€",
    "eu": "€", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "⟨", "ra": "⟩", "sl": "/", "ul": "_", "pl": "+",
    "mi": "−", "eq": "=", "if": "∞", "12": "½", "14": "¼", "34": "¾", "dg": "†", "ct": "¢", "Po": "£", "bq": "‚",
    "Bq": "„", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "/o": "ø", "/O": "Ø", "~~": "≈", "~=": "≈", "**": "∗",
    "*a": "α", "*b": "β", "*p": "π", "*l": "λ", "*m": "μ", "*W": "Ω", "mc": "µ", "md": "⋅", "pd": "∂",
}  # fmt: skip
_ACCENTS: Final = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ",": "\u0327"}
_STRINGS: Final = {
    "L\"": "“", "R\"": "”", "C`": "", "C'": "", "--": "—", "PI": "π", "Aq": "'", "lq": "“", "rq": "”", "R": "®",
    "Tm": "™", "Lq": "“", "Rq": "”", "q": '"', "Ba": "|", "Le": "≤", "Ge": "≥", "Lt": "<", "Gt": ">",
}  # fmt: skip
_ESCAPE: Final = re.compile(
    r"""\\(?:
      \((?P<two>..)|\[(?P<long>[^\]]*)\]
    | \*(?:\((?P<string>..)|\[(?P<string_long>[^\]]*)\]|(?P<string_one>.))
    | [fFmMgkVYn][+-]?(?:\(..|\[[^\]]*\]|.)
    | s(?:[+-]?\d\d?|[+-]?\(..|\[[^\]]*\]|'[^']*')
    | [hvwlLDobNxXZCRSHB]'(?P<quoted>[^']*)'
    | (?P<one>.?)
    )""",
    re.X | re.S,
)
_ONE: Final = {
    "-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": "\t", "'": "'", "`": "`", ".": ".",
}  # fmt: skip

_ARGUMENT: Final = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"\\])(?:\\.|[^\s\\])*)')

_FONTS: Final = frozenset(("B", "I", "SM", "R", "CW"))
_TURNS: Final = frozenset(("BR", "RB", "BI", "IB", "IR", "RI", "SB"))
_LINKS: Final = frozenset(("UR", "MT", "URL", "MTO"))
_PARAGRAPHS: Final = frozenset((
    "PP", "P", "LP", "Pp", "Lp", "HP", "sp", "Sp", "bp", "IP", "TP", "TQ", "RS", "RE", "It", "Bl", "El", "Bd",
    "Ed",
))  # fmt: skip
_AS_THEY_ARE: Final = frozenset(("nf", "EX", "Vb", "Bd"))
_FILLED: Final = frozenset(("fi", "EE", "Ve", "Ed"))
_HEADINGS: Final = frozenset(("SH", "SS", "Sh", "Ss"))


def roff(source: str) -> str:
    """A page's text, paragraphs with a blank line between them."""
    return _Page(source).text()


class _Page:
    """One pass over the lines of a page."""

    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()
        self._at = 0
        self._out: list[str] = []
        self._paragraph: list[str] = []
        self._verbatim = False
        self._name = ""
        self._strings = dict(_STRINGS)
        self._tag = False
        """The next line of text is what a paragraph is about, and gets a line of its own."""
        self._last_condition = True

    def text(self) -> str:
        while self._at < len(self._lines):
            line = self._lines[self._at]
            self._at += 1
            self._line(line)
        self._end()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._out)).strip()

    def _line(self, line: str) -> None:
        if re.match(r"""^['.][ \t]*(\\["#}]|$)|^\\["#]""", line):
            return
        if line[:1] in ".'" and (request := re.match(r"[.'][ \t]*([^\s\\]+)[ \t]*(.*)", line, re.S)):
            self._request(request[1], request[2])
            return
        if line[:1] == ".":
            return
        words = self._plain(line)
        if not words.strip():
            self._end()
            self._out.append("")
        else:
            self._add(words)

    def _add(self, words: str) -> None:
        if self._verbatim:
            self._out.append(words)
            return
        self._paragraph.append(words.strip())
        if self._tag:
            self._tag = False
            self._end()

    def _end(self) -> None:
        """The paragraph so far as one line."""
        if self._paragraph:
            joined = self._paragraph[0]
            for part in self._paragraph[1:]:
                # Chinese and Japanese have no spaces between words, and lines are broken between any two.
                wide = bool(joined and part and min(joined[-1], part[0]) >= "\u3000")
                joined += part if wide else f" {part}"
            self._out.append(joined)
            self._paragraph = []

    def _request(self, name: str, rest: str) -> None:
        if name in ("if", "ie", "el"):
            self._condition(name, rest)
        elif name in ("de", "de1", "am", "ig"):
            end = "." + (rest.split()[-1] if name == "ig" and rest.split() else ".")
            while self._at < len(self._lines) and self._lines[self._at].rstrip() != end:
                self._at += 1
            self._at += 1
        elif name == "ds":
            key, _, value = rest.partition(" ")
            self._strings[key] = self._plain(value.strip().removeprefix('"'))
        elif name == "TS":
            self._table()
        elif name in _HEADINGS:
            self._heading(rest)
        elif name in ("TH", "Dt"):
            words = self._arguments(rest)
            self._out.append(f"{words[0]}({words[1]})" if len(words) > 1 else " ".join(words))
        elif name == "br" or name in _AS_THEY_ARE or name in _FILLED or name in _PARAGRAPHS:
            self._break(name, rest)
        elif name in _FONTS or name in _LINKS or name.startswith("%"):
            self._add(" ".join(self._arguments(rest)))
        elif name in _TURNS:
            self._add("".join(self._arguments(rest)))
        elif name == "OP":
            self._add(f"[{' '.join(self._arguments(rest))}]")
        elif name == "SY":
            self._end()
            self._add(" ".join(self._arguments(rest)))
        elif name in ("D1", "Dl"):
            self._end()
            self._out.append(self._mdoc(["No", *self._arguments(rest)]))
        elif name in MDOC:
            self._add(self._mdoc([name, *self._arguments(rest)]))

    def _break(self, name: str, rest: str) -> None:
        self._end()
        if name in _PARAGRAPHS:
            self._out.append("")
        if name in _AS_THEY_ARE and (name != "Bd" or ("-filled" not in rest and "-ragged" not in rest)):
            self._verbatim = True
        if name in _FILLED:
            self._verbatim = False
        if name in ("TP", "TQ"):
            self._tag = True
        if name == "IP" and (words := self._arguments(rest)) and words[0].strip():
            mark = words[0].strip()
            if len(mark) > 2:
                self._out.append(mark)
            else:
                self._paragraph.append(mark)
        if name == "It" and rest:
            self._out.append(self._mdoc(["No", *self._arguments(rest)]))

    def _heading(self, rest: str) -> None:
        self._end()
        self._verbatim = False
        words = " ".join(self._arguments(rest))
        if not words and self._at < len(self._lines):
            words = self._plain(re.sub(r"^\.\s*[A-Z]{1,2}\s+", "", self._lines[self._at]))
            self._at += 1
        self._out += ["", words, ""]

    def _condition(self, name: str, rest: str) -> None:
        """Of `.if n`, `.if t` and their like what a terminal would show; numbers are taken to be 0."""
        met = not self._last_condition
        if name != "el":
            condition, _, rest = rest.lstrip().partition(" ")
            met = condition in ("n", "!t")
            self._last_condition = met
        rest = rest.lstrip()
        if rest.startswith("\\{"):
            if met:
                if rest := rest[2:].lstrip().removeprefix("\\"):
                    self._line(rest)
                return
            depth = 1 + rest[2:].count("\\{") - rest.count("\\}")
            while depth > 0 and self._at < len(self._lines):
                depth += self._lines[self._at].count("\\{") - self._lines[self._at].count("\\}")
                self._at += 1
        elif met and rest:
            self._line(rest)

    def _table(self) -> None:
        """A table's rows as lines, its cells with tabs between them."""
        self._end()
        self._out.append("")
        separator, in_format, in_cell = "\t", True, False
        while self._at < len(self._lines):
            line = self._lines[self._at]
            self._at += 1
            if line.startswith(".TE"):
                break
            if in_format:
                if line.rstrip().endswith(";") and (other := re.search(r"tab\s*\((.)\)", line)):
                    separator = other[1]
                in_format = not line.rstrip().endswith(".")
            elif line.startswith(".T&"):
                in_format = True
            elif line.startswith((".", "'")):
                words = line.split(None, 1)
                if len(words) > 1 and words[0][1:] in _FONTS | _TURNS and self._out:
                    joint = "" if words[0][1:] in _TURNS else " "
                    self._out[-1] += " " + joint.join(self._arguments(words[1]))
            elif line.strip() not in ("_", "="):
                cells = self._plain(re.sub(r"T[{}]", "", line).replace(separator, "\t")).strip(" ")
                if in_cell:
                    before = self._out[-1]
                    apart = before and cells and not before.endswith("\t") and not cells.startswith("\t")
                    self._out[-1] = f"{before} {cells}" if apart else before + cells
                else:
                    self._out.append(cells)
                in_cell = line.rstrip().endswith("T{") or (in_cell and not line.startswith("T}"))
        self._out.append("")

    def _mdoc(self, words: list[str]) -> str:
        if words[0] == "Nm" and not self._name and len(words) > 1:
            self._name = words[1]
        return mdoc_line(words, self._name)

    def _arguments(self, rest: str) -> list[str]:
        """A macro's arguments, their escapes taken out; quotes hold words together."""
        found = _ARGUMENT.findall(re.sub(r"\\\".*", "", rest))
        return [self._plain(quoted.replace('""', '"') or word) for quoted, word in found]

    def _plain(self, line: str) -> str:
        """A line with escapes as the characters that they stand for; those that mean no character are gone."""
        if "\\" not in line:
            return line
        return _ESCAPE.sub(self._character, re.sub(r'\\["#].*', "", line, flags=re.S))

    def _character(self, found: re.Match[str]) -> str:
        if (name := found["two"] or found["long"]) is not None:
            if code := re.fullmatch(r"u([0-9A-F]{4,6})", name):
                return chr(int(code[1], 16))
            if len(name) == 2 and name[0] in _ACCENTS and name[1].isalpha():
                return normalize("NFC", name[1] + _ACCENTS[name[0]])
            return _CHARACTERS.get(name, "")
        if (string := found["string"] or found["string_long"] or found["string_one"]) is not None:
            return self._strings.get(string, "")
        return _ONE.get(found["one"] or "", "")
