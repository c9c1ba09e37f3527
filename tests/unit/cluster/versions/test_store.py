"""Blobs, manifests and aliases: on a disk, and in fsspec's memory as an object store would have them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import VersionError
from cluster.versions.blobs import Blobs
from cluster.versions.files import Files
from cluster.versions.manifest import Manifest, Manifests
from cluster.versions.store import Store
from tests.store_contract import MODEL, OpenFiles, RacingContract, StoreContract, move


class TestOnDisk(StoreContract, RacingContract):
    @pytest.fixture
    def open_files(self, tmp_path: Path) -> OpenFiles:
        return lambda: Files(str(tmp_path / "store"))


class TestInMemory(StoreContract):
    @pytest.fixture
    def open_files(self) -> OpenFiles:
        url = f"memory://{uuid.uuid4().hex}"
        return lambda: Files(url)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""]
)
def test_a_damaged_blob_is_refused_until_it_is_put_again(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    blobs = Blobs(Files(str(tmp_path)))
    digest, _ = blobs.put(b"weights")
    path = tmp_path / "blobs" / digest[:2] / digest
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VersionError, match=f"blob {digest[:12]} .* is damaged"):
        blobs.get(digest)
    blobs.put(b"weights")
    assert blobs.get(digest) == b"weights"


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
    half = tmp_path / "blobs" / "aa" / ".writing-x"
    half.write_bytes(b"half")
    assert files.names("blobs") == ["blobs/aa/b"]
    written = half.stat().st_mtime
    assert files.unfinished(written - 1) == [] and files.unfinished(written + 1) == ["blobs/aa/.writing-x"]


def test_a_url_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(VersionError, match="nowhere://x can't be opened"):
        Files("nowhere://x")


def test_a_store_that_writes_a_name_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(Files, "create", lambda self, name, data: self.renew(name, data) is None)
    with pytest.raises(VersionError, match="lets a name be written twice"):
        store.aliases.move("production", move(1))
    assert store.aliases.names() == [] and store.files.names("probes") == []


def test_an_object_store_that_is_out_of_reach_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(f"memory://{uuid.uuid4().hex}")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no route")

    for name in ("pipe_file", "cat_file", "find", "info"):
        monkeypatch.setattr(type(files._system), name, unreachable)
    for call in (lambda: files.create("a", b""), lambda: files.read("a"), lambda: files.names("a")):
        with pytest.raises(VersionError, match=r"a can't be .* memory://.*: no route"):
            call()
    with pytest.raises(VersionError, match="no route"):
        files.has("a")


def test_a_version_is_found_by_alias_and_by_its_beginning(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    digest = store.manifests.put(Manifest(MODEL, {0: {1: "a"}}))
    store.aliases.move("production", move(1, digest))
    assert store.find("production") == store.find(digest[:6]) == store.find(digest) == digest
    assert store.missing(store.manifests.get(digest)) == ("a",) and store.missing(Manifest(MODEL)) == ()
    with pytest.raises(VersionError, match="no version begins with 'candidate'"):
        store.find("candidate")
