"""Collecting garbage: nothing that could still serve goes, and everything else does."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import VersionError
from cluster.versions.aliases import Move
from cluster.versions.collect import collect, garbage, kept, retained
from cluster.versions.manifest import Manifest
from cluster.versions.publish import publish, publish_base
from cluster.versions.store import Store
from tests.unit.cluster.versions import tiny

MODEL = "ab" * 32
LATER = time.time() + 1000


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store") if request.param == "disk" else f"memory://{uuid.uuid4().hex}")


def version(store: Store, *blobs: bytes, parent: str = "") -> str:
    named = {number: store.blobs.put(data)[0] for number, data in enumerate(blobs)}
    return store.manifests.put(Manifest(MODEL, {0: named}, parent=parent))


def point(store: Store, alias: str, *digests: str) -> None:
    for number, digest in enumerate(digests, len(store.aliases.history(alias)) + 1):
        store.aliases.move(alias, Move(number, digest, 0.0))


def all_of(store: Store) -> set[str]:
    return {name for name in store.files.names("") if not name.startswith("aliases/")}


def test_what_aliases_point_to_or_pointed_to_lately_stays(store: Store) -> None:
    old, before, now, tried, loose = (version(store, b"shared", bytes([number])) for number in range(5))
    point(store, "production", old, before, now)
    point(store, "candidate", tried)
    names = all_of(store)
    told = collect(store, history=2, min_age_s=10, dry_run=True, now=LATER)
    assert all_of(store) == names, "only said"
    went = collect(store, history=2, min_age_s=10, now=LATER)
    assert told == went and went.manifests == tuple(sorted([old, loose])) and len(went.blobs) == 2
    assert (went.kept_manifests, went.kept_blobs, went.unfinished) == (3, 4, 0)
    assert set(store.manifests.all()) == {before, now, tried}
    assert all(store.missing(store.manifests.get(digest)) == () for digest in (before, now, tried))
    assert [move.manifest for move in store.aliases.history("production")] == [old, before, now]
    assert collect(store, history=1, min_age_s=10, now=LATER).manifests == (before,)
    assert collect(store, history=9, min_age_s=10, now=LATER).bytes == 0


def test_what_runs_stays_and_parents_do_not(store: Store) -> None:
    parent = version(store, b"1")
    child = version(store, b"2", parent=parent)
    went = collect(store, {child}, history=1, min_age_s=10, now=LATER)
    assert went.manifests == (parent,) and store.manifests.all() == [child]
    assert store.missing(store.manifests.get(child)) == () and len(store.blobs.all()) == 1


def test_what_is_young_stays(store: Store) -> None:
    version(store, b"1")
    store.blobs.put(b"of a version that is just being published")
    names = all_of(store)
    assert collect(store, history=1, min_age_s=600).bytes == 0 and all_of(store) == names
    assert collect(store, history=1, min_age_s=10, now=LATER).bytes > 0 and all_of(store) == set()


def test_a_version_that_is_made_from_an_old_one_keeps_it_for_a_while(tmp_path: Path) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    first = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1)]))
    long_ago = time.time() - 1000
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    second = tiny.changes(checkpoint, tmp_path / "b.safetensors", [(1, 1)])
    made = publish(store, checkpoint, second, parent=first.digest)
    assert collect(store, history=1, min_age_s=500).bytes == 0
    assert store.missing(store.manifests.get(made.digest)) == ()


def test_what_nobody_knows_the_age_of_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    version(store, b"1")

    def cannot_tell(*args: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(store.files._system), "modified", cannot_tell)
    assert collect(store, history=1, min_age_s=0, now=LATER).bytes == 0


def test_a_version_that_is_kept_and_damaged_stops_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    good, bad = version(store, b"1"), version(store, b"2")
    point(store, "production", bad)
    (tmp_path / "manifests" / bad).write_bytes(b"{}")
    names = all_of(store)
    with pytest.raises(VersionError, match=f"manifest {bad[:12]} .* is damaged"):
        collect(store, history=1, min_age_s=0, now=LATER)
    assert all_of(store) == names
    point(store, "production", good)
    assert collect(store, history=1, min_age_s=0, now=LATER).manifests == (bad,)


def test_what_publishers_left_unfinished_goes_with_its_age(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    version(store, b"1")
    half = tmp_path / "blobs" / "aa" / ".writing-x"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    assert collect(store, history=1, min_age_s=600).unfinished == 0 and half.exists()
    told = collect(store, history=1, min_age_s=600, now=LATER, dry_run=True)
    assert told.unfinished == 1 and half.exists()
    assert collect(store, history=1, min_age_s=600, now=LATER) == told and not half.exists()


def test_the_base_is_a_version_like_any(tmp_path: Path) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    digest = publish_base(store, checkpoint)
    point(store, "production", digest)
    assert collect(store, history=1, min_age_s=0, now=LATER).bytes == 0
    assert collect(store, {digest}, history=1, min_age_s=0, now=LATER).kept_manifests == 1


names = st.sampled_from("abcdefgh")
stores = st.dictionaries(names, st.frozensets(st.integers(0, 9), max_size=3))


@given(
    stores,
    st.lists(st.lists(names, max_size=4), max_size=3),
    st.frozensets(names),
    st.frozensets(names),
    st.integers(1, 4),
)
def test_what_is_kept_is_whole_and_what_is_not_leaves_no_blob(
    content: dict[str, frozenset[int]],
    moves: list[list[str]],
    running: frozenset[str],
    young: frozenset[str],
    history: int,
) -> None:
    manifests = {
        name: Manifest(MODEL, {0: {blob: str(blob) for blob in blobs}}) for name, blobs in content.items()
    }
    blobs = {str(number) for number in range(10)}
    histories = [[Move(n, digest, 0.0) for n, digest in enumerate(alias, 1)] for alias in moves]
    named = retained(histories, running, history)
    assert named == running | {digest for alias in moves for digest in alias[-history:]}
    stay = kept(manifests, named, lambda digest: digest in young)
    assert stay == {digest for digest in manifests if digest in named | young}
    needed = {blob for digest in stay for blob in manifests[digest].blobs}
    found = garbage(
        manifests, {digest: manifests[digest] for digest in stay}, blobs, lambda digest: digest == "9"
    )
    assert {*found.manifests} == manifests.keys() - stay
    assert {*found.blobs} == blobs - needed - {"9"}
