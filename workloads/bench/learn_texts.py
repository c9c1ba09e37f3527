"""What packages hold, as plain text: man pages, HTML, a dictionary, R's strings, a SWORD module.

Nothing but the standard library, and no formatter that a machine may have in another version: the same bytes give the
same text everywhere.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Final

from workloads.bench.learn_roff import roff

# Control characters but for tab and line feed.
_RUBBISH: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_BLANK_LINES: Final = re.compile(r"\n(?:[ \t]*\n){2,}")


def decoded(data: bytes) -> str | None:
    """A file as text: UTF-8, else Latin-1; None if it is neither."""
    if b"\x00" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidied(text: str) -> str:
    """A text without control characters, white space at the ends of lines, and more than one blank line in a row."""
    text = re.sub(r"\r\n?|\f|\v", "\n", text)
    text = re.sub(r"[ \t]+\n", "\n", _RUBBISH.sub("", text))
    return _BLANK_LINES.sub("\n\n", text).strip()


def plain(data: bytes) -> Iterator[str]:
    """A file that is text already."""
    if text := decoded(data):
        yield text


def man_page(data: bytes) -> Iterator[str]:
    """A man page, packed or not."""
    if text := decoded(unpacked(data)):
        yield roff(text)


def unpacked(data: bytes) -> bytes:
    """What gzip or dictzip packed; other bytes as they are."""
    return zlib.decompress(data, wbits=31) if data.startswith(b"\x1f\x8b") else data


def html(data: bytes) -> Iterator[str]:
    """What a page says, but for its navigation."""
    if text := decoded(data):
        page = _Page()
        page.feed(text)
        page.close()
        yield "".join(page.parts)


_BLOCKS: Final = frozenset((
    "address", "article", "blockquote", "body", "br", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5",
    "h6", "hr", "li", "ol", "p", "pre", "section", "table", "td", "th", "tr", "ul",
))  # fmt: skip
_UNSEEN: Final = frozenset(("head", "nav", "script", "style"))
_VOID: Final = frozenset((
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr",
))  # fmt: skip
_NAVIGATION: Final = re.compile(r"docnav|navheader|navfooter|navigation|page-links|\btoc\b")


class _Page(HTMLParser):
    """Collects text; elements that are unseen are counted, since they hold others."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._open: list[str] = []
        self._unseen: int | None = None
        """How many elements were open where the unseen one began."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n" if tag in ("br", "li", "tr", "td", "th") else "\n\n")
        if tag in _VOID:
            return
        if self._unseen is None and (tag in _UNSEEN or _NAVIGATION.search(dict(attrs).get("class") or "")):
            self._unseen = len(self._open)
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n" if tag in ("li", "tr", "td", "th") else "\n\n")
        if tag in self._open:
            while self._open.pop() != tag:
                pass
            if self._unseen is not None and len(self._open) <= self._unseen:
                self._unseen = None

    def handle_data(self, data: str) -> None:
        if self._unseen is None:
            if "pre" not in self._open:
                data = re.sub(r"\s+", " ", data)
                # Where a line begins, white space in the source is none on the page.
                data = data.lstrip() if not self.parts or self.parts[-1].endswith("\n") else data
            if data:
                self.parts.append(data)


_BASE64: Final = {mark: value for value, mark in enumerate(ascii_uppercase + ascii_lowercase + digits + "+/")}


def dictd(data: bytes, index: bytes) -> Iterator[str]:
    """A dictd database's entries, but for those that describe the database (`00-database...`)."""
    text = unpacked(data)
    about: list[tuple[int, int]] = []
    for line in index.decode("utf-8", "replace").splitlines():
        word, _, place = line.partition("\t")
        if word.startswith(("00-database", "00database")):
            begins, _, size = place.partition("\t")
            about.append((_number(begins), _number(size)))
    kept: list[bytes] = []
    at = 0
    for start, length in sorted(about):
        kept.append(text[at:start])
        at = max(at, start + length)
    kept.append(text[at:])
    if words := decoded(b"".join(kept)):
        yield words


def _number(text: str) -> int:
    number = 0
    for mark in text.strip():
        number = number * 64 + _BASE64[mark]
    return number


def r_strings(data: bytes) -> Iterator[str]:
    """Of R's `.rdb` (objects packed by zlib behind their lengths) the vectors of strings, one line a string."""
    while len(data) > 4:
        packed = zlib.decompressobj()
        thing = packed.decompress(data[4:])
        data = packed.unused_data
        # The head of R's serialisation: "X\n", three numbers, and from version 3 on the encoding's name.
        at = 14
        if struct.unpack_from(">i", thing, 2)[0] >= 3:
            at += 4 + struct.unpack_from(">i", thing, 14)[0]
        kind, number = struct.unpack_from(">ii", thing, at)
        if kind & 0xFF != 16:
            continue
        lines, at = [], at + 8
        for _ in range(number):
            length = max(struct.unpack_from(">i", thing, at + 4)[0], 0)
            lines.append(thing[at + 8 : at + 8 + length])
            at += 8 + length
        if text := decoded(b"\n".join(lines)):
            yield text


def sword(data: bytes, index: bytes) -> Iterator[str]:
    """Of a SWORD module (`.bzz`, with its `.bzs`) each book's text without the markup and the notes."""
    for start, length, _ in struct.iter_unpack("<III", index):
        if length and (markup := decoded(zlib.decompress(data[start : start + length]))):
            text = re.sub(r"<note\b.*?</note>", " ", markup, flags=re.S)
            text = re.sub(r'<(chapter|title|lg|div)\b[^>]*(sID|level)="[^>]*>', "\n\n", text)
            text = re.sub(r"</title>|<l\b[^>]*sID=[^>]*>", "\n", text)
            text = unescape(re.sub(r"<[^>]*>", "", text))
            yield re.sub(r" *\n *", "\n", re.sub(r"[ \t]+", " ", text))
