"""Blobs, manifests and aliases: on a disk, and in fsspec's memory as an object store would have them."""

from __future__ import annotations

import os
import threading
import uuid
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import VersionError
from cluster.versions.aliases import Aliases, Move
from cluster.versions.blobs import Blobs
from cluster.versions.files import Files
from cluster.versions.manifest import Manifest, Manifests

MODEL = "ab" * 32


@pytest.fixture(params=["disk", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return Files(str(tmp_path / "store") if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def move(number: int, manifest: str = "m") -> Move:
    return Move(number, manifest, 0.0)


def test_a_name_is_written_once(files: Files) -> None:
    assert not files.has("a/b") and files.names("a") == []
    assert files.create("a/b", b"first") and not files.create("a/b", b"second")
    assert files.read("a/b") == b"first" and files.names("a") == ["a/b"] and files.has("a/b")
    assert files.remove("a/b") == 5 and files.remove("a/b") == 0 and files.names("a") == []
    with pytest.raises(VersionError, match="has no a/b"):
        files.read("a/b")


def test_the_same_bytes_are_one_blob(files: Files) -> None:
    blobs = Blobs(files)
    first, new = blobs.put(b"weights")
    assert new and blobs.put(b"weights") == (first, False) and first == sha256(b"weights").hexdigest()
    other, _ = blobs.put(b"other")
    assert blobs.all() == {first, other} and blobs.get(first) == b"weights"
    assert blobs.remove(other) == 5 and not blobs.has(other) and blobs.has(first)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""]
)
def test_a_damaged_blob_is_refused(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    blobs = Blobs(Files(str(tmp_path)))
    digest, _ = blobs.put(b"weights")
    path = tmp_path / "blobs" / digest[:2] / digest
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VersionError, match=f"blob {digest[:12]} .* is damaged"):
        blobs.get(digest)


def test_a_manifest_is_named_by_what_it_says(files: Files) -> None:
    manifests = Manifests(files)
    first = Manifest(MODEL, {3: {0: "a", 1: "b"}, 4: {0: "c"}}, author="x", metrics={"loss": 1.5})
    digest = manifests.put(first)
    assert manifests.put(first) == digest == first.digest and manifests.get(digest) == first
    second = Manifest(MODEL, {3: {0: "a", 1: "z"}, 4: {0: "c", 7: "d"}}, {"router": "r"}, parent=digest)
    assert second.changed(first) == first.changed(second) == {3: (1,), 4: (7,)} and first.changed(first) == {}
    assert Manifest(MODEL).changed(first) == {3: (0, 1), 4: (0,)}, "back to the base checkpoint's"
    assert second.blobs == {"a", "z", "c", "d", "r"}
    assert manifests.find(digest[:8]) == digest
    manifests.put(second)
    with pytest.raises(VersionError, match="several versions begin"):
        manifests.find("")
    with pytest.raises(VersionError, match="no version begins"):
        manifests.find("zz")


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path) -> None:
    manifests = Manifests(Files(str(tmp_path)))
    digest = manifests.put(Manifest(MODEL, {0: {0: "a"}}))
    path = tmp_path / "manifests" / digest
    path.write_bytes(path.read_bytes().replace(b"ab", b"cd", 1))
    with pytest.raises(VersionError, match="is damaged"):
        manifests.get(digest)


digests = st.text("0123456789abcdef", min_size=4, max_size=4)
manifests = st.builds(
    Manifest,
    st.just(MODEL),
    st.dictionaries(st.integers(0, 5), st.dictionaries(st.integers(0, 99), digests, max_size=4)),
    metrics=st.dictionaries(
        st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3
    ),
    author=st.text(max_size=8),
    reason=st.text(max_size=8),
)


@given(manifests)
def test_what_is_written_is_read(manifest: Manifest) -> None:
    kept = Manifests(Files(f"memory://{uuid.uuid4().hex}"))
    found = kept.get(kept.put(manifest))
    assert found == manifest and found.digest == manifest.digest


def test_an_alias_moves_from_where_it_was_seen_or_not_at_all(files: Files) -> None:
    aliases = Aliases(files)
    assert aliases.current("production") is None and aliases.names() == []
    aliases.move("production", move(1, "a"))
    aliases.move("production", move(2, "b"))
    for stale in (1, 2, 4):
        with pytest.raises(VersionError, match="moved by somebody else"):
            aliases.move("production", move(stale, "c"))
    assert aliases.current("production") == move(2, "b") and aliases.names() == ["production"]
    assert aliases.history("production") == [move(1, "a"), move(2, "b")]
    for name in ("", "Production", "a/b", "-a", "a" * 50):
        with pytest.raises(VersionError, match="no name for an alias"):
            aliases.current(name)


def test_of_many_who_move_an_alias_at_once_one_succeeds_each_time(tmp_path: Path) -> None:
    """What everybody was told is one history, in order: moves are linearizable."""
    told: list[tuple[int, str]] = []
    start = threading.Barrier(4)

    def compete(name: str) -> None:
        aliases = Aliases(Files(str(tmp_path)))
        start.wait()
        for _ in range(15):
            seen = aliases.current("production")
            number = (seen.number if seen else 0) + 1
            try:
                aliases.move("production", move(number, name))
            except VersionError:
                continue
            told.append((number, name))

    threads = [threading.Thread(target=compete, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = [(made.number, made.manifest) for made in Aliases(Files(str(tmp_path))).history("production")]
    assert sorted(told) == history and [number for number, _ in history] == list(range(1, len(history) + 1))
    assert len(history) >= 15


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(str(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VersionError, match="No space left on device"):
        Blobs(files).put(b"weights")
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_being_written_is_not_seen(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    files.create("blobs/aa/b", b"1")
    (tmp_path / "blobs" / "aa" / ".writing-x").write_bytes(b"half")
    assert files.names("blobs") == ["blobs/aa/b"]


def test_a_url_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(VersionError, match="nowhere://x can't be opened"):
        Files("nowhere://x")
