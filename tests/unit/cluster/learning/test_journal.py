"""A loop that is killed anywhere goes on with the same round: no sample is lost, and none is used twice."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import LearningError
from cluster.learning.backlog import Counts, next_domain
from cluster.learning.journal import ACCEPTED, Journal, LoopState, Phase, at, begun, ended, forget, known
from cluster.learning.records import Record
from cluster.learning.stream import Stream
from cluster.versions.files import Files
from tests.unit.cluster.learning.remembered_stream import RememberedStream

CAPACITY = 30


class Killed(BaseException):
    """As by SIGKILL: nothing is caught and nothing tidied."""


class Crashing(Files):
    """A disk whose user is killed before or after some of its writes."""

    def __init__(self, url: str, crashes: Iterator[bool]) -> None:
        super().__init__(url)
        self._crashes = crashes

    def _maybe(self) -> None:
        if next(self._crashes, False):
            raise Killed

    def create(self, name: str, data: bytes) -> bool:
        self._maybe()
        made = super().create(name, data)
        self._maybe()
        return made

    def renew(self, name: str, data: bytes) -> None:
        self._maybe()
        super().renew(name, data)
        self._maybe()

    def remove(self, name: str) -> int:
        self._maybe()
        return super().remove(name)


ENDS: list[Phase] = ["published", "promoted", "rolled back", "refused", "superseded"]


def one_step(journal: Journal, stream: Stream, ends: list[Phase], used: list[tuple[int, set[str]]]) -> bool:
    """What a loop does between two writes; whether there is anything to do."""
    state = journal.load()
    if state.now is None:
        counts = Counts(0.0)
        counts.read(stream.after(0))
        waiting = counts.waiting(state.offsets)
        domain = next_domain(waiting, least=1, age_s=0, now=0)
        if domain is None:
            return False
        journal.save(begun(state, domain, waiting[domain].upto, parent="", seed=0, parts=3, now=1.0))
        return True
    now = state.now
    samples = [
        record
        for number, shard in stream.after(now.after)
        if number <= now.upto
        for record in shard
        if record.domain == now.domain
    ]
    # Ends by the round's number; one that is superseded is begun again and ends in another way.
    end = ends[(now.number - 1) % len(ends)]
    follows: dict[Phase, Phase] = {
        "gathering": "training",
        "training": "judging",
        "judging": "published",
        "published": "staged",
        "staged": "on trial",
    }
    last: dict[Phase, Phase] = {
        "refused": "judging",
        "published": "published",
        "superseded": "staged",
        "promoted": "on trial",
        "rolled back": "on trial",
    }
    if now.phase == "training":
        used.append((now.number, {record.id for record in samples}))
    if now.phase != last[end]:
        journal.save(at(state, follows[now.phase]))
        return True
    digest = ""
    if end in ACCEPTED:
        reservoir = journal.replayed(state, CAPACITY)
        reservoir.add(samples)
        digest = journal.keep(reservoir)
    journal.save(ended(state, end, 2.0, reservoir=digest))
    return True


def run(folder: Path, crashes: list[bool], ends: list[Phase]) -> tuple[LoopState, Any, list[Any]]:
    """A loop over five shards of two domains, begun again as often as it is killed."""
    stream = RememberedStream(str(folder / "stream"))
    for number in range(5):
        stream.append(
            [
                Record("text", f"{number}.{n}", 1.0, domain="ab"[(n + number) % 2], answer="t")
                for n in range(4)
            ]
        )
    used: list[tuple[int, set[str]]] = []
    left = iter(crashes)
    while True:
        try:
            files = Crashing(str(folder / "state"), left)
            while one_step(Journal(files), stream, ends, used):
                pass
            break
        except Killed:
            continue
    journal = Journal(Files(str(folder / "state")))
    state = journal.load()
    return state, journal.replayed(state, CAPACITY).to_bytes(), used


@settings(max_examples=15)
@given(st.lists(st.booleans(), max_size=80), st.lists(st.sampled_from(ENDS), min_size=1, max_size=4))
def test_crashes_change_nothing(crashes: list[bool], ends: list[Phase]) -> None:
    if set(ends) == {"superseded"}:
        ends = [*ends, "promoted"]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        state, reservoir, used = run(Path(one), crashes, ends)
        calm, expected, _ = run(Path(other), [], ends)
    assert state == calm and reservoir == expected
    assert state.offsets == {"a": 5, "b": 5} and state.now is None
    # A phase that is done again has the same samples, and every sample is in one round that counts.
    by_round: dict[int, set[str]] = {}
    for number, samples in used:
        assert by_round.setdefault(number, samples) == samples
    counted = Counter(
        sample for past in state.past if past.phase != "superseded" for sample in by_round[past.number]
    )
    assert set(counted.values()) == {1} and len(counted) == 20


def test_of_two_loops_the_second_to_write_is_told(tmp_path: Path) -> None:
    one, other = (Journal(Files(str(tmp_path))) for _ in range(2))
    assert one.load() == other.load() == LoopState()
    mine = begun(LoopState(), "a", 3, parent="p", seed=5, parts=2, now=1.0)
    one.save(mine)
    with pytest.raises(LearningError, match="somebody else has written"):
        other.save(begun(LoopState(), "b", 3, parent="p", seed=5, parts=2, now=1.0))
    assert other.load() == mine
    other.save(at(mine, "training"))
    with pytest.raises(LearningError, match="somebody else has written"):
        one.save(at(mine, "training", samples=7))


def test_old_entries_and_reservoirs_go(tmp_path: Path) -> None:
    journal = Journal(Files(str(tmp_path)))
    state = journal.load()
    for number in range(1, 30):
        reservoir = journal.replayed(state, 5)
        reservoir.add([Record("text", str(number), 1.0, domain="a", answer="t")])
        state = known(state, "a", number, journal.keep(reservoir))
        journal.save(state)
    assert len(list((tmp_path / "journal").iterdir())) == 8
    assert [path.name for path in (tmp_path / "reservoirs").iterdir()] == [state.reservoir]
    assert Journal(Files(str(tmp_path))).load() == state


def test_what_is_forgotten_is_not_replayed_any_more(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    assert forget(files, "me") == 0
    journal = Journal(files)
    reservoir = journal.replayed(journal.load(), 9)
    reservoir.add(Record("request", str(n), 1.0, "me" if n < 3 else "", "a", answer="t") for n in range(5))
    journal.save(known(LoopState(), "a", 2, journal.keep(reservoir)))
    assert forget(files, "me") == 3 and forget(files, "me") == 0
    found = Journal(files)
    assert found.replayed(found.load(), 9).sizes == {"a": 2} and found.load().offset("a") == 2
    assert len(list((tmp_path / "reservoirs").iterdir())) == 1, "nor is it kept"
    with pytest.raises(LearningError, match="somebody else has written"):
        journal.save(known(LoopState(), "a", 3, ""))


def test_what_can_not_follow_is_refused(tmp_path: Path) -> None:
    state = begun(LoopState({"a": 2}), "a", 3, parent="p", seed=5, parts=2, now=1.0)
    assert state.now is not None and (state.now.after, state.now.seed, state.now.part) == (2, 6, 0)
    for phase in ("judging", "published", "on trial", "promoted"):
        with pytest.raises(ValueError, match="does not follow gathering"):
            at(state, phase)
    for end in ("promoted", "rolled back", "training", "superseded"):
        with pytest.raises(ValueError, match="does not end gathering"):
            ended(state, end, 2.0)
    with pytest.raises(ValueError, match="goes on"):
        begun(state, "b", 3, parent="p", seed=5, parts=2, now=1.0)
    with pytest.raises(ValueError, match="goes on"):
        known(state, "a", 3, "")
    done = ended(state, "refused", 2.0, reasons=("it is worse",))
    assert done.now is None and done.past[-1].reasons == ("it is worse",) and done.offset("a") == 3
    with pytest.raises(ValueError, match="were used up to shard 3"):
        begun(done, "a", 3, parent="p", seed=5, parts=2, now=1.0)
    again = begun(done, "b", 4, parent="p", seed=5, parts=2, now=1.0)
    assert again.now is not None and (again.now.number, again.now.part) == (2, 1)
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "000000000001").write_text('{"rounds": "many"}')
    with pytest.raises(LearningError, match="000000000001 makes no sense"):
        Journal(Files(str(tmp_path))).load()


def test_what_waits_longest_is_next() -> None:
    counts = Counts(0.0)
    records = [Record("text", f"{n}", float(n), domain="ab"[n % 2], answer=str(n)) for n in range(8)]
    counts.read([(1, records[:4]), (2, [*records[4:], Record("feedback", "1", 1.0, domain="a")])])
    waiting = counts.waiting({"a": 1})
    assert {name: (w.samples, w.upto, w.oldest) for name, w in waiting.items()} == {
        "a": (2, 2, 4.0),
        "b": (4, 2, 1.0),
    }
    assert next_domain(waiting, least=2, age_s=100, now=10) == "b"
    assert next_domain(waiting, least=5, age_s=100, now=10) is None
    assert next_domain(waiting, least=5, age_s=8, now=10) == "b"
    assert next_domain({"a": replace(waiting["a"], samples=0)}, least=1, age_s=0, now=10) is None
    assert counts.last == 2 and not counts.held
    held = Counts(0.5)
    held.read([(1, records)])
    assert sum(held.held.values()) + sum(w.samples for w in held.waiting({}).values()) == 8
