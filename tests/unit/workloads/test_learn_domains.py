"""Domains of text: packages got by an apt of the test's own, formats read, documents cut and chosen, the same again."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import struct
import sys
import tarfile
import zlib
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest

from cluster.errors import LearningError
from cluster.learning.split import holdout_of
from workloads import cli
from workloads.bench import learn_domains
from workloads.bench.learn_builtin import builtin_domains
from workloads.bench.learn_documents import chosen, documents_of, without_boilerplate
from workloads.bench.learn_domains import Source, make, make_builtin
from workloads.bench.learn_packages import Pinned, fetched, files_in, version_of
from workloads.bench.learn_roff import roff
from workloads.bench.learn_texts import dictd, html, man_page, plain, r_strings, sword, tidied


def tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("./usr/share/doc/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return lzma.compress(out.getvalue())


def deb(version: str, files: Mapping[str, bytes]) -> bytes:
    control = f"Package: thing\nVersion: {version}\nArchitecture: all\n".encode()
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar({"control": control}),
        "data.tar.xz": tar(files),
    }
    out = b"!<arch>\n"
    for name, data in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data
        out += b"\n" * (len(data) % 2)
    return out


PAGES = {
    f"usr/share/doc/page{number:02d}.txt": "\n\n".join(
        f"Paragraph {part} of page {number}, which says what no other paragraph says." for part in range(40)
    ).encode()
    for number in range(30)
}


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that knows the packages in a folder, and that notes what it was asked for."""
    programs, offered = tmp_path / "bin", tmp_path / "offered"
    programs.mkdir()
    offered.mkdir()
    program = programs / "apt-get"
    program.write_text(
        f"""#!/bin/sh
echo "$3" >> {offered}/asked
if [ -e "{offered}/$3" ]; then /bin/cp "{offered}/$3" ./thing.deb; else
echo "W: not this line" >&2; echo "E: Version '1' for 'thing' was not found" >&2; exit 100; fi
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return offered


def offer(apt: Path, version: str, files: Mapping[str, bytes], *names: str) -> Pinned:
    data = deb(version, files)
    for name in names or (f"thing={version}", "thing"):
        (apt / name).write_bytes(data)
    return Pinned("thing", version, sha256(data).hexdigest())


def asked(apt: Path) -> list[str]:
    return (apt / "asked").read_text().split()


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_package_is_downloaded_once_and_read(apt: Path) -> None:
    pinned = offer(apt, "1:2.0-1", PAGES)
    package = fetched(pinned)
    assert fetched(pinned) == package
    assert asked(apt) == ["thing=1:2.0-1"]
    assert (package.version, package.sha256) == ("1:2.0-1", pinned.sha256)
    assert version_of(package.file) == "1:2.0-1"
    assert dict(files_in(package.file, r".*\.txt")) == PAGES
    assert [p.name for p in package.file.parent.iterdir()] == [package.file.name]


def test_a_damaged_file_in_the_cache_is_downloaded_again(apt: Path) -> None:
    pinned = offer(apt, "1", PAGES)
    file = fetched(pinned).file
    file.write_bytes(b"torn")
    assert fetched(pinned).file == file
    assert dict(files_in(file, r".*\.txt")) == PAGES
    assert len(asked(apt)) == 2


def test_a_version_that_is_gone_is_told_with_the_way_out(apt: Path) -> None:
    offer(apt, "2", PAGES, "thing")
    wanted = Pinned("thing", "1", "0" * 64)
    with pytest.raises(LearningError, match="thing=1 can't be had: Version '1' for 'thing'") as error:
        fetched(wanted)
    assert "--any-version" in error.value.hint
    taken = fetched(wanted, any_version=True)
    assert (taken.version, taken.sha256) == ("2", sha256(taken.file.read_bytes()).hexdigest())


def test_another_build_of_the_same_version_is_not_taken(apt: Path) -> None:
    offer(apt, "1", PAGES)
    wanted = Pinned("thing", "1", "0" * 64)
    with pytest.raises(LearningError, match="thing 1 is another build"):
        fetched(wanted)
    assert fetched(wanted, any_version=True).version == "1"


def test_without_apt_the_file_may_be_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = deb("1", PAGES)
    pinned = Pinned("thing", "1", sha256(data).hexdigest())
    with pytest.raises(LearningError, match="no apt-get") as error:
        fetched(pinned, any_version=True)
    place = Path(error.value.hint.rpartition(": ")[2])
    place.parent.mkdir(parents=True)
    place.write_bytes(data)
    assert fetched(pinned).file == place


@pytest.mark.parametrize("data", [b"", b"no archive", deb("1", PAGES)[:-200], b"!<arch>\n"])
def test_what_is_no_package_is_told(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "thing.deb"
    file.write_bytes(data)
    with pytest.raises(LearningError, match=r"thing\.deb is no Debian package, or is damaged"):
        files_in(file, ".*")


@pytest.fixture
def one_domain(apt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of two domains, of one package."""
    source = Source(offer(apt, "1", PAGES), r".*\.txt", learn_domains._each(plain))
    monkeypatch.setattr(learn_domains, "DOMAINS", {"pages": (source,), "general": (source,)})
    return apt


def test_the_same_packages_give_the_same_bytes(one_domain: Path, tmp_path: Path) -> None:
    made = make(tmp_path / "a", limit=20_000)
    make(tmp_path / "b", limit=20_000)
    assert written(tmp_path / "a") == written(tmp_path / "b")
    make(tmp_path / "b", limit=20_000, seed=1)
    assert written(tmp_path / "a") != written(tmp_path / "b")
    assert asked(one_domain) == ["thing=1"]
    texts = [data for name, data in written(tmp_path / "a").items() if name.startswith("pages/")]
    assert (made["pages"].documents, made["pages"].bytes) == (len(texts), sum(map(len, texts)))
    assert 15_000 < made["pages"].bytes <= 20_000
    index = json.loads((tmp_path / "a" / "domains.json").read_text())["domains"]
    assert index["pages"]["packages"] == [
        {"name": "thing", "version": "1", "sha256": made["pages"].packages[0]["sha256"]}
    ]
    assert index["pages"]["digest"] == made["pages"].digest


def test_one_domain_is_made_anew_and_the_others_stay(one_domain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make(folder, limit=20_000)
    before = written(folder)
    make(folder, ["pages"], limit=9_000)
    after = written(folder)
    assert {n: d for n, d in before.items() if n.startswith("general/")} == {
        n: d for n, d in after.items() if n.startswith("general/")
    }
    assert sum(len(d) for n, d in after.items() if n.startswith("pages/")) <= 9_000
    assert sorted(p.name for p in folder.iterdir()) == ["domains.json", "general", "pages"]


def test_mistakes_in_making_domains(one_domain: Path, tmp_path: Path) -> None:
    with pytest.raises(LearningError, match="no domain nonsense"):
        make(tmp_path / "a", ["nonsense"])
    (tmp_path / "b" / "pages").mkdir(parents=True)
    with pytest.raises(LearningError, match="was not made by this command"):
        make(tmp_path / "b")
    with pytest.raises(LearningError, match="no text for pages within 10 bytes"):
        make(tmp_path / "c", limit=10)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "domains.json").write_text("{")
    with pytest.raises(LearningError, match=r"domains\.json can't be read"):
        make(tmp_path / "d")
    (tmp_path / "e").write_text("")
    with pytest.raises(LearningError, match=r"can't be written|can't be read"):
        make(tmp_path / "e")


def test_the_pins_are_whole() -> None:
    for sources in learn_domains.DOMAINS.values():
        for source in sources:
            assert len(source.package.sha256) == 64
            assert source.package.version


def test_parts_are_equal_as_far_as_there_is_text() -> None:
    small = [f"small {number:04d} {'s' * 87}" for number in range(10)]
    large = [f"large {number:04d} {'l' * 87}" for number in range(100)]
    largest = [f"other {number:04d} {'o' * 87}" for number in range(1000)]
    taken = chosen([largest, small, large], 10_000, "0")
    count = {kind: sum(text.startswith(kind) for text in taken) for kind in ("small", "large", "other")}
    assert count["small"] == 10
    assert abs(count["large"] - count["other"]) <= 1
    assert 9_800 < sum(len(text) + 1 for text in taken) <= 10_000
    assert chosen([largest, small, large], 10_000, "0") == taken
    assert chosen([largest, small, large], 10_000, "1") != taken


def test_documents_are_cut_between_paragraphs_and_each_is_there_once() -> None:
    long = "\n\n".join(f"paragraph {number} " + "word " * 100 for number in range(2000))
    found = documents_of([long, long, "short"])
    assert all(1000 < len(text) <= 8000 for text in found[:-1])
    assert all(text.startswith("paragraph") for text in found)
    assert " ".join(" ".join(found).split()) == " ".join(long.split())


def test_notices_of_many_are_left_out_and_short_lines_stay() -> None:
    notice = "This program is free software; you can redistribute it, and so on and so forth."
    texts = [
        f"NAME\n\n{notice}\n\nWhat this page says is said in page {number} alone." for number in range(10)
    ]
    left = without_boilerplate(texts)
    assert not any(notice in text for text in left)
    assert all("NAME" in text and "alone" in text for text in left)
    assert without_boilerplate(texts[:3]) == texts[:3]


def test_rubbish_is_cleaned() -> None:
    assert tidied("a\x00b \r\nc\x07\n\n\n\nd\te\n") == "ab\nc\n\nd\te"
    assert list(plain(b"\x7fELF\x00\x01")) == []
    assert list(plain("früher".encode("latin-1"))) == ["früher"]


MAN = r""".\" a comment
.de XX
.sp not this
..
.ds name Name
.TH LS 1 "May" "x"
.SH "Ü BER"
ls \- \fIlist\fR files\|,
and \(lqmore\(rq \*[name]
.if t .B not this
.if n .B but this
.ie \n(.g \{\
.B nor this
.\}
.el .B and this
.TP
\fB\-a\fP, \fB\-\-all\fP
all of them
.IP \(bu 2
an item
.nf
  as it
    is
.fi
.TS
tab(;) allbox;
l l.
one;two
T{
three
T};four
.TE
.BR grep (1),
\('eclair \[u00E9] \e \(aq
"""


def test_a_man_page_as_text() -> None:
    assert roff(MAN).splitlines() == [
        "LS(1)",
        "",
        "Ü BER",
        "",
        "ls - list files, and “more” Name but this and this",
        "",
        "-a, --all",
        "all of them",
        "",
        "• an item",
        "  as it",
        "    is",
        "",
        "one\ttwo",
        "three\tfour",
        "",
        "grep(1), éclair é \\ '",
    ]
    assert list(man_page(gzip.compress(MAN.encode()))) == [roff(MAN)]


def test_lines_of_japanese_are_joined_without_spaces() -> None:
    assert roff("指定したファイルを\n表示する\nls の場合\n") == "指定したファイルを表示する ls の場合"


def test_a_page_in_mdoc() -> None:
    page = """.Dd today
.Dt TFTP 1
.Sh NAME
.Nm tftp
.Nd transfers files
.Sh SYNOPSIS
.Nm
.Op Fl v Ar level
.Oo Ar host Oc
.Sh DESCRIPTION
See
.Xr ftp 1 ,
.Pq Dq quoted words
and
.Fl a Ns Ar b .
.Bl -tag
.It Fl x Ar file
Text.
.El
"""
    assert roff(page).splitlines() == [
        "TFTP(1)",
        "",
        "NAME",
        "",
        "tftp transfers files",
        "",
        "SYNOPSIS",
        "",
        "tftp [-v level] [host]",
        "",
        "DESCRIPTION",
        "",
        "See ftp(1), (“quoted words”) and -ab.",
        "",
        "-x file",
        "Text.",
    ]


def test_a_web_page_as_text() -> None:
    page = b"""<html><head><title>no</title></head><body>
<div class="page-links"><a href="x">up <br> there</a><div>in</div></div>
<h1>Title</h1><p>One &amp; <b>two</b>
   three.</p><script>no()</script><ul class="docnav"><li>Prev</li></ul>
<pre>a
  b</pre></body></html>"""
    assert [tidied(text) for text in html(page)] == ["Title\n\nOne & two three.\n\na\n  b"]


def test_a_dictionary_without_what_it_says_of_itself() -> None:
    about, words = b"00-database-info\n  told\n", "Aardvark\n  An animal.\nÄther\n  A stuff.\n".encode()
    # From 0 on, 24 bytes, in the digits that dictd writes numbers with.
    index = b"00-database-info\tA\tY\naardvark\tY\tY\n"
    assert list(dictd(gzip.compress(about + words), index)) == [words.decode()]


def test_strings_of_r() -> None:
    def strings(*texts: str) -> bytes:
        head = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
        body = struct.pack(">ii", 16, len(texts))
        for text in texts:
            body += struct.pack(">ii", 0x40009, len(text.encode())) + text.encode()
        return head + body

    numbers = b"X\n" + struct.pack(">iii", 2, 0x40201, 0x20300) + struct.pack(">iii", 13, 1, 7)
    blob = b""
    for thing in (strings("EMMA", "", "by Zoë"), numbers, strings("more")):
        blob += struct.pack(">I", len(thing)) + zlib.compress(thing)
    assert list(r_strings(blob)) == ["EMMA\n\nby Zoë", "more"]


def test_a_module_of_sword() -> None:
    markup = (
        '<title level="1" type="main">Matthew</title> <div sID="g1" type="x-p"/><chapter n="1" sID="M.1"/>'
        '<w lemma="strong:G1">The</w> <w>book</w>,<note placement="foot">not this</note> of &amp;.'
        '<l level="1" sID="g2"/>“<w>Behold</w>”<l eID="g2"/>'
    )
    blob = zlib.compress(markup.encode())
    index = struct.pack("<III", 0, len(blob), len(markup)) + struct.pack("<III", 0, 0, 0)
    assert [tidied(text) for text in sword(blob, index)] == ["Matthew\n\nThe book, of &.\n“Behold”"]


def test_builtin_domains_are_large_enough_and_the_same_again() -> None:
    domains = builtin_domains()
    assert set(domains) == {"python", "unicode", "sums", "general"}
    assert builtin_domains() == domains
    for texts in domains.values():
        assert sum(len(text.encode()) for text in texts) > 200_000
        assert all(32 <= len(text) <= 8000 for text in texts)
        held_out = sum(holdout_of(text, 0.1, 1) is not None for text in texts)
        assert 0 < held_out < len(texts) / 4
    assert "forty-two" in " ".join(domains["sums"])


def test_the_command_without_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "d"
    monkeypatch.setattr(
        sys, "argv", ["expertmesh", "bench", "domains", str(folder), "--builtin", "--bytes", "50000"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "this Python" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == [
        "domains.json",
        "general",
        "python",
        "sums",
        "unicode",
    ]
    before = written(folder)
    assert set(make_builtin(folder, ["sums"], limit=50_000)) == {"sums"}
    assert written(folder) == before
