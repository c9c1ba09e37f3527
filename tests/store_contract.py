"""What a store of versions promises, wherever its files are: on a disk, in memory, on an object store.

A subclass gives the fixture `open_files`, which opens the same empty folder again and again.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from hashlib import sha256

import pytest

from cluster.errors import VersionError
from cluster.versions.aliases import Aliases, Move
from cluster.versions.blobs import Blobs
from cluster.versions.files import Files
from cluster.versions.manifest import Manifest, Manifests

MODEL = "ab" * 32
OpenFiles = Callable[[], Files]


def move(number: int, manifest: str = "m") -> Move:
    return Move(number, manifest, 0.0)


class StoreContract:
    """One writer at a time."""

    @pytest.fixture
    def files(self, open_files: OpenFiles) -> Files:
        return open_files()

    def test_a_name_is_written_once(self, files: Files) -> None:
        assert not files.has("a/b") and files.names("a") == [] and files.size("a/b") == 0
        assert files.create("a/b", b"first") and not files.create("a/b", b"second")
        assert files.read("a/b") == b"first" and files.names("a") == ["a/b"]
        assert files.has("a/b") and not files.has("a") and files.size("a/b") == 5
        assert files.remove("a/b") == 5 and files.remove("a/b") == 0 and files.names("a") == []
        with pytest.raises(VersionError, match="has no a/b"):
            files.read("a/b")

    def test_what_is_renewed_is_whole_and_as_new(self, files: Files) -> None:
        files.renew("a", b"first")
        files.create("b", b"damaged")
        # Object stores may count whole seconds.
        began = time.time() - 1
        files.renew("a", b"first")
        files.renew("b", b"second")
        for name, data in (("a", b"first"), ("b", b"second")):
            at = files.modified(name)
            assert files.read(name) == data and at is not None and began <= at <= time.time() + 1
        assert files.modified("c") is None and files.unfinished(time.time() + 60) == []

    def test_it_writes_no_name_twice(self, files: Files) -> None:
        files.check_exclusive()
        assert files.names("probes") == []

    def test_the_same_bytes_are_one_blob(self, files: Files) -> None:
        blobs = Blobs(files)
        first, new = blobs.put(b"weights")
        assert new and blobs.put(b"weights") == (first, False) and first == sha256(b"weights").hexdigest()
        other, _ = blobs.put(b"other")
        assert blobs.all() == {first, other} and blobs.get(first) == b"weights" and blobs.size(first) == 7
        assert blobs.remove(other) == 5 and not blobs.has(other) and blobs.has(first)
        assert blobs.modified(first) is not None and blobs.modified(other) is None

    def test_a_manifest_is_named_by_what_it_says(self, files: Files) -> None:
        manifests = Manifests(files)
        first = Manifest(MODEL, {3: {0: "a", 1: "b"}, 4: {0: "c"}}, author="x", metrics={"loss": 1.5})
        digest = manifests.put(first)
        assert manifests.put(first) == digest == first.digest and manifests.get(digest) == first
        second = Manifest(MODEL, {3: {0: "a", 1: "z"}, 4: {0: "c", 7: "d"}}, {"router": "r"}, parent=digest)
        assert second.changed(first) == first.changed(second) == {3: (1,), 4: (7,)}
        assert first.changed(first) == {}
        assert Manifest(MODEL).changed(first) == {3: (0, 1), 4: (0,)}, "back to the base checkpoint's"
        assert second.blobs == {"a", "z", "c", "d", "r"}
        assert list(second.named())[1:] == [
            ("layer 3, expert 1", "z"),
            ("layer 4, expert 0", "c"),
            ("layer 4, expert 7", "d"),
            ("router", "r"),
        ]
        assert manifests.find(digest[:8]) == digest
        manifests.renew(digest)
        manifests.put(second)
        with pytest.raises(VersionError, match="several versions begin"):
            manifests.find("")
        with pytest.raises(VersionError, match="no version begins"):
            manifests.find("zz")
        assert manifests.size(digest) == len(first.to_json()) == manifests.remove(digest)
        assert manifests.all() == [second.digest]

    def test_an_alias_moves_from_where_it_was_seen_or_not_at_all(self, files: Files) -> None:
        aliases = Aliases(files)
        assert aliases.current("production") is None and aliases.names() == []
        aliases.move("production", move(1, "a"))
        aliases.move("production", move(2, "b"))
        for stale in (1, 2, 4):
            with pytest.raises(VersionError, match="moved by somebody else"):
                aliases.move("production", move(stale, "c"))
        assert aliases.current("production") == move(2, "b") and aliases.names() == ["production"]
        assert aliases.history("production") == [move(1, "a"), move(2, "b")]
        assert aliases.history("production", 1) == [move(2, "b")] and aliases.history("production", 0) == []
        aliases.move("production-2", move(1, "z"))
        assert aliases.current("production") == move(2, "b"), "another's with the same beginning"
        for name in ("", "Production", "a/b", "-a", "a" * 50):
            with pytest.raises(VersionError, match="no name for an alias"):
                aliases.current(name)


class RacingContract:
    """Several writers at once, of which none knows of the others."""

    rounds = 15
    writers = 4

    def test_of_many_who_create_a_name_one_does(self, open_files: OpenFiles) -> None:
        made: dict[int, list[int]] = defaultdict(list)

        def create(number: int) -> None:
            files = open_files()
            for turn in range(self.rounds):
                if files.create(f"r/{turn}", bytes([number])):
                    made[turn].append(number)

        _at_once(create, self.writers)
        for turn in range(self.rounds):
            assert len(made[turn]) == 1 and open_files().read(f"r/{turn}") == bytes(made[turn])

    def test_moves_of_an_alias_are_one_history(self, open_files: OpenFiles) -> None:
        """What everybody was told is one history, in order: moves are linearizable, even those that say the same."""
        told: list[int] = []

        def compete(number: int) -> None:
            aliases = Aliases(open_files())
            for _ in range(self.rounds):
                seen = aliases.current("production")
                following = (seen.number if seen else 0) + 1
                try:
                    aliases.move("production", move(following, "same"))
                except VersionError:
                    continue
                told.append(following)

        _at_once(compete, self.writers)
        history = [made.number for made in Aliases(open_files()).history("production")]
        assert sorted(told) == history == list(range(1, len(history) + 1))
        assert len(history) >= self.rounds


def _at_once(what: Callable[[int], None], times: int) -> None:
    start, failed = threading.Barrier(times), list[BaseException]()

    def run(number: int) -> None:
        start.wait()
        try:
            what(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
