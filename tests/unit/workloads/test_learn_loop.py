"""The loop over rounds with a server that is a few lines: whatever crashes, the same rounds with the same samples."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config_learning import LearningConfig
from cluster.errors import LearningError, VersionError
from cluster.learning.journal import Journal, LoopState, Round
from cluster.learning.judge import GateVerdict
from cluster.learning.records import Record
from cluster.learning.reservoir import Reservoir
from cluster.learning.split import holdout_of
from cluster.learning.stream import Stream
from cluster.versions.files import Files
from tests.unit.cluster.learning.remembered_stream import RememberedStream
from workloads.learn_judging import Judgement
from workloads.learn_loop import Loop
from workloads.learn_serving import Pausing, Trialled
from workloads.learn_work import in_turn


class Killed(BaseException):
    """As by SIGKILL."""


@dataclass
class FakeServer:
    """What outlives the loop: jobs that were put down, and the server."""

    fate: Sequence[str]
    """Of the n-th round: what becomes of it."""
    jobs: dict[str, set[str]] = field(default_factory=dict)
    trained: Counter[str] = field(default_factory=Counter)
    serving: str = "base"
    live: set[str] = field(default_factory=set)
    candidate: str = ""
    looks: int = 0
    moves: list[str] = field(default_factory=list)
    rolled_back: set[str] = field(default_factory=set)

    def of(self, now: Round) -> str:
        return self.fate[(now.number - 1) % len(self.fate)]


@dataclass
class FakeWork:
    """Every call may be the last one of its process."""

    server: FakeServer
    stream: Stream
    crashes: Iterator[bool]
    serves: bool = True

    def _maybe(self) -> None:
        if next(self.crashes, False):
            raise Killed

    def serving(self) -> str:
        return self.server.serving

    def samples(self, domain: str, after: int, upto: int, seen: Reservoir) -> Sequence[Record]:
        shards = (shard for number, shard in self.stream.after(after) if number <= upto)
        return [record for shard in shards for record in shard if record.domain == domain]

    def lacks(self, domain: str, old: Sequence[str], upto: int) -> str | None:
        return None if old else "nothing is known"

    def gather(self, now: Round, old: Mapping[str, Sequence[Record]], new: Sequence[Record]) -> int:
        self._maybe()
        if self.server.of(now) == "useless":
            raise LearningError("no sample is left of the filters")
        assert old and now.domain not in old
        self.server.jobs.setdefault(now.name, {record.id for record in new})
        self._maybe()
        return 3

    def train(self, now: Round) -> int:
        self._maybe()
        assert self.server.jobs[now.name]
        self.server.trained[now.name] += 1
        self._maybe()
        return 7

    def judge(self, now: Round, old: Sequence[str]) -> Judgement:
        self._maybe()
        if self.server.of(now) == "worse":
            return Judgement(GateVerdict(False, ("it is worse",), {"rise": 0.5}), 0.1)
        return Judgement(GateVerdict(True, (), {"rise": -0.5}), 0.1, f"learnt-{now.number}")

    def stage(self, now: Round) -> None:
        self._maybe()
        if self.server.of(now) == "too large":
            raise VersionError("hosts have no room")
        self.server.live.add(now.manifest)
        self._maybe()

    def try_out(self, now: Round) -> bool:
        self._maybe()
        assert now.manifest in self.server.live and now.manifest not in self.server.rolled_back
        if self.server.looks % 3 == 1:
            self.server.looks += 1
            return False
        self.server.candidate = now.manifest
        self._maybe()
        return True

    def trialled(self, now: Round) -> tuple[Trialled, str]:
        server = self.server
        server.looks += 1
        if now.manifest in server.moves:
            return "promoted", "good enough"
        if now.manifest in server.rolled_back:
            return "rolled back", "more errors"
        if server.candidate != now.manifest:
            return "gone", ""
        if server.looks % 2:
            return "waiting", ""
        server.candidate = ""
        if server.of(now) == "promoted":
            server.serving = now.manifest
            server.moves.append(now.manifest)
        elif server.of(now) == "restarted":
            server.live.clear()
            return "gone", ""
        else:
            server.rolled_back.add(now.manifest)
        return self.trialled(now)

    def discard(self, now: Round) -> None:
        self._maybe()


FATES = ["promoted", "rolled back", "worse", "useless", "too large", "restarted"]
SETTINGS = LearningConfig(known=("general",), least=3, age=50.0, holdout=0.0, holdout_parts=2, reservoir=12)


def records(domain: str, count: int, at: float = 0.0) -> list[Record]:
    return [
        Record("text", f"{domain}{at}.{n}", at, domain=domain, answer=f"{domain} {n}") for n in range(count)
    ]


def until_idle(folder: Path, server: FakeServer, crashes: Sequence[bool] = (), **more: bool) -> LoopState:
    """The loop, begun again as often as it is killed, until there is nothing to do; what it wrote down."""
    stream, left = RememberedStream(str(folder / "stream")), iter(crashes)
    while True:
        try:
            work = FakeWork(server, stream, left, **more)
            loop = Loop(Journal(Files(str(folder / "state"))), stream, work, SETTINGS, clock=lambda: 100.0)
            while loop.look() or loop.state.now is not None:
                pass
            return loop.state
        except Killed:
            continue


def filled(folder: Path) -> Path:
    stream = Stream(str(folder / "stream"))
    stream.append([*records("general", 4), *records("law", 5)])
    stream.append([*records("code", 4, 5.0), *records("law", 1, 99.0)])
    stream.append(records("maths", 2, 90.0))
    stream.append(records("art", 2, 10.0))
    return folder


@settings(max_examples=15)
@given(st.lists(st.booleans(), max_size=50), st.lists(st.sampled_from(FATES), min_size=1, max_size=3))
def test_crashes_change_nothing(crashes: list[bool], fate: list[str]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        server, calm = FakeServer(fate), FakeServer(fate)
        state = until_idle(filled(Path(one)), server, crashes)
        expected = until_idle(filled(Path(other)), calm)
        journals = [Journal(Files(f"{folder}/state")) for folder in (one, other)]
        reservoirs = [j.replayed(s, 12).to_bytes() for j, s in zip(journals, (state, expected), strict=True)]
    assert state == expected and reservoirs[0] == reservoirs[1]
    assert server.jobs == calm.jobs and server.serving == calm.serving and server.moves == calm.moves
    # The longest waiting first; of maths there are too few, and they are too young.
    assert [past.domain for past in state.past] == ["law", "code", "art"]
    used = Counter(sample for samples in server.jobs.values() for sample in samples)
    assert set(used.values()) <= {1}


def test_what_became_of_a_round_is_written_down(tmp_path: Path) -> None:
    state = until_idle(filled(tmp_path), FakeServer(["promoted", "worse", "too large"]))
    law, code, art = state.past
    assert (law.phase, law.manifest, law.samples, law.experts, law.steps) == ("promoted", "learnt-1", 6, 3, 7)
    assert law.reasons == ("good enough",) and (law.parent, code.parent) == ("base", "learnt-1")
    assert (code.phase, code.reasons, code.metrics) == ("refused", ("it is worse",), {"rise": 0.5})
    assert (art.phase, art.reasons) == ("rolled back", ("hosts have no room",))
    assert [past.part for past in state.past] == [0, 1, 0]
    sizes = Journal(Files(str(tmp_path / "state"))).replayed(state, 12).sizes
    assert sizes == {"general": 4, "law": 6}, "what was not accepted is not replayed"
    assert state.offsets == {"general": 4, "law": 4, "code": 4, "art": 4}


def test_a_server_that_begins_anew_again_and_again_ends_a_round(tmp_path: Path) -> None:
    law = until_idle(filled(tmp_path), FakeServer(["restarted"])).past[0]
    assert law.phase == "rolled back" and law.attempts == 3 and "began anew in each of 3" in law.reasons[0]


def test_without_a_server_it_ends_with_publishing(tmp_path: Path) -> None:
    state = until_idle(filled(tmp_path), FakeServer(["promoted"]), serves=False)
    assert {past.phase for past in state.past} == {"published"} and state.past[0].manifest == "learnt-1"


def test_samples_of_a_round_that_somebody_overtook_wait_for_another(tmp_path: Path) -> None:
    server = FakeServer(["promoted"])
    stream = Stream(str(filled(tmp_path) / "stream"))
    work = FakeWork(server, stream, iter(()))
    loop = Loop(Journal(Files(str(tmp_path / "state"))), stream, work, SETTINGS, clock=lambda: 100.0)
    while loop.state.now is None or loop.state.now.phase != "published":
        loop.look()
    server.serving = "by hand"
    loop.look()
    first = loop.state.past[-1]
    assert (first.phase, first.domain, loop.state.offset("law")) == ("superseded", "law", 0)
    loop.look()
    assert loop.state.now is not None
    assert (loop.state.now.domain, loop.state.now.parent, loop.state.now.number) == ("law", "by hand", 2)


def test_what_can_not_be_judged_waits_and_says_why(tmp_path: Path) -> None:
    stream = Stream(str(tmp_path / "stream"))
    stream.append(records("law", 5))
    loop = Loop(
        Journal(Files(str(tmp_path / "state"))),
        stream,
        FakeWork(FakeServer(["promoted"]), stream, iter(())),
        SETTINGS,
        clock=lambda: 100.0,
    )
    assert not loop.look() and loop.waits_for == {"law": "nothing is known"}
    stream.append(records("general", 1))
    assert loop.look() and loop.look() and loop.state.now is not None and loop.waits_for == {}


def test_it_pauses_at_once_and_goes_on_when_it_stays_quiet() -> None:
    now, inside = [0.0], [0.0]
    pausing = Pausing(lambda: inside[0], 4, clock=lambda: now[0])
    assert not pausing()
    inside[0] = 5
    assert not pausing(), "asked once a second"
    now[0] = 1.0
    assert pausing()
    inside[0] = 4
    for second in range(2, 4):
        now[0] = second
        assert pausing(), "it may be between two requests"
    now[0] = 4
    assert not pausing()
    quiet = Pausing(lambda: None, 4, clock=lambda: now[0])
    assert quiet(), "one that does not answer is busy"


def test_parts_of_the_holdout_take_turns_and_help_each_other_out() -> None:
    texts = [r for r in records("law", 400) if holdout_of(r.text, 0.5, 4) is not None]
    turns = [in_turn(texts, 0.5, 4, part, 8) for part in range(4)]
    assert sorted(r.id for turn in turns for r in turn) == sorted(r.id for r in texts)
    few = in_turn(texts, 0.5, 4, 1, len(turns[1]) + 1)
    assert few == [*turns[1], *turns[2]]
    assert len(in_turn(texts, 0.5, 4, 1, 10_000)) == len(texts)
