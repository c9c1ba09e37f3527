"""The watch between a loop's steps: what it reads when, what outlives it, and that an alarm begins a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config_learning import DriftConfig, LearningConfig
from cluster.errors import HostError, LearningError
from cluster.learning.journal import Journal, LoopState
from cluster.learning.records import Record
from cluster.learning.split import holdout_of
from cluster.learning.stream import Stream
from cluster.versions.files import Files
from tests.unit.workloads.test_learn_loop import FakeServer, FakeWork
from workloads.learn_drift import DriftWatch, load
from workloads.learn_loop import Loop
from workloads.learn_readers import ServerReader, shortened
from workloads.learn_status import as_json, as_text, status_of

SETTINGS = LearningConfig(
    known=("general",),
    least=1000,
    age=1e9,
    holdout=0.3,
    holdout_parts=3,
    drift=DriftConfig(every=60.0, warm=4, texts=8, false_alarms=0.01, update=True),
)


@dataclass
class FakeReader:
    """One version after the other, each of which takes so many bits per byte."""

    bits: float = 2.0
    by_domain: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    fails: bool = False

    def read(self, manifest: str, texts: Sequence[str]) -> Iterator[float | None]:
        if self.fails:
            raise HostError("it does not answer", "see whether it runs")
        for text in texts:
            self.texts.append(text)
            yield self.by_domain.get(text.split()[0], self.bits)


@dataclass
class World:
    """A stream, a state, and a clock."""

    folder: Path
    now: float = 1000.0
    serving: str = "v0"
    reader: FakeReader = field(default_factory=FakeReader)

    def __post_init__(self) -> None:
        self.stream = Stream(str(self.folder / "stream"))
        self.files = Files(str(self.folder / "state"))

    def watch(self, settings: LearningConfig = SETTINGS) -> DriftWatch:
        return DriftWatch(
            self.files,
            self.stream,
            self.held,
            lambda: self.serving,
            self.reader,
            settings,
            clock=lambda: self.now,
        )

    def held(self, upto: int) -> Mapping[str, Sequence[Record]]:
        found: dict[str, list[Record]] = {}
        for _, shard in self.stream.after(0):
            for record in shard:
                if holdout_of(record.text, SETTINGS.holdout, 1) is not None:
                    found.setdefault(record.domain, []).append(record)
        return found

    def came(self, domain: str, count: int, **more: Any) -> None:
        start = self.stream.last() * 1000
        self.stream.append(
            [
                Record(
                    "text",
                    f"{domain}{start + n}",
                    self.now,
                    domain=domain,
                    answer=f"{domain} {start + n} {'x' * 40}",
                )
                for n in range(count)
            ]
        )

    def look(self, watch: DriftWatch, loop: LoopState | None = None) -> bool:
        self.now += 61.0
        return watch.look(loop or LoopState())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_it_looks_as_often_as_it_should_and_each_text_is_read_once(world: World) -> None:
    world.came("law", 60)
    watch = world.watch()
    assert world.look(watch) and not watch.look(LoopState())
    assert len(world.reader.texts) == 16, "eight held-out ones, and eight that came in"
    held = len(world.held(1)["law"])
    for _ in range(6):
        world.look(watch)
    assert len(world.reader.texts) == 8 + held, "then nothing is new"
    world.serving = "v1"
    world.look(watch)
    assert len(world.reader.texts) == 16 + held, "another version reads them anew"


def test_parts_of_the_holdout_take_turns(world: World) -> None:
    world.came("law", 200)
    watch = world.watch()

    def parts() -> set[int | None]:
        world.reader.texts.clear()
        world.look(watch)
        return {holdout_of(text, SETTINGS.holdout, 3) for text in world.reader.texts[:8]}

    assert [parts(), parts(), parts()] == [{1}, {2}, {0}]


def test_an_alarm_is_told_and_outlives_the_loop(world: World) -> None:
    world.came("law", 60)
    watch = world.watch()
    for version in ("v0", "v1", "v2", "v3", "v4"):
        world.serving = version
        for _ in range(4):
            world.look(watch)
        world.reader.bits *= 1.05
    assert watch.urgent == {"law"}
    again = world.watch()
    assert again.state == watch.state and again.urgent == {"law"}
    quiet = LearningConfig(**{**dict(SETTINGS), "drift": DriftConfig(update=False)})
    assert world.watch(quiet).urgent == frozenset()
    found = status_of(world.files, world.stream, SETTINGS)
    text, _, _ = as_text(found, world.now)
    assert "ALARM law gets worse since" in text and "held-out text takes +" in text
    told = as_json(found)["drift"]["domains"]["law"]
    assert told["alarm"]["what"] == "holdout" and told["alarms"] == 1 and told["points"][-1]["rise"] > 0.1


def test_what_can_not_be_measured_is_said_and_tried_again(world: World) -> None:
    world.came("law", 60)
    watch = world.watch()
    world.reader.fails = True
    assert world.look(watch) and watch.state.trouble == "it does not answer" and watch.state.tracks == {}
    assert (
        "can't be measured: it does not answer"
        in as_text(status_of(world.files, world.stream, SETTINGS), world.now)[0]
    )
    world.reader.fails = False
    world.look(watch)
    assert watch.state.trouble == "" and watch.state.upto == 1 and "law" in watch.state.tracks


def test_a_damaged_document_says_what_to_do(world: World) -> None:
    world.files.renew("drift", b"{")
    with pytest.raises(LearningError, match="makes no sense"):
        world.watch()
    world.files.renew("drift", b'{"form": 2}')
    with pytest.raises(LearningError, match="is of form 2"):
        load(world.files)


@pytest.mark.parametrize("update", [True, False])
def test_an_alarm_begins_a_round_with_what_there_is(world: World, update: bool) -> None:
    world.came("general", 60)
    world.came("law", 60)
    settings = LearningConfig(**{**dict(SETTINGS), "drift": replace_drift(update=update)})
    watch, server = world.watch(settings), FakeServer(["promoted"], serving="v0")
    work = FakeWork(server, world.stream, iter(()))
    loop = Loop(Journal(world.files), world.stream, work, settings, drift=watch, clock=lambda: world.now)

    def turn(looks: int) -> None:
        for _ in range(looks):
            loop.look()
            world.now += 20.0

    turn(30)
    assert loop.state.rounds == 0, "there are too few samples, and they are young"
    world.serving = "v1"
    world.reader.by_domain = {"law": 2.6}
    turn(12)
    assert watch.state.tracks["law"].alarms == 1
    assert loop.state.rounds == (1 if update else 0)
    if update:
        turn(40)
        assert [past.domain for past in loop.state.past] == ["law"]
        assert watch.state.tracks["law"].alarm is None and watch.urgent == frozenset()


def replace_drift(**changes: Any) -> DriftConfig:
    return SETTINGS.drift.model_copy(update=changes)


def test_texts_are_shortened_to_so_many_tokens() -> None:
    text, tokens = shortened("a" * 1000, lambda text: [7] * (len(text) // 2), 50)
    assert len(tokens) <= 50 and len(text) >= 98
    assert shortened("abc", lambda text: [1, 2], 5) == ("abc", [1, 2])


def answers(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/models":
        return httpx.Response(200, json={"data": [{"id": "tiny"}]})
    told = [None, {"5": {"logprob": -0.6931471805599453}, "9": {"logprob": -0.1}}]
    manifest = "v1" if request.headers.get("authorization") == "Bearer k" else "v0"
    return httpx.Response(
        200, json={"choices": [{"prompt_logprobs": told}]}, headers={"x-expertmesh-manifest": manifest}
    )


def reading(key: str, handler: Any = answers) -> ServerReader:
    reader = ServerReader("http://server", key, lambda text: [4, 5], 10)
    headers = reader._client.headers
    reader._client = httpx.Client(
        transport=httpx.MockTransport(handler), base_url="http://server", headers=headers
    )
    return reader


def test_a_server_tells_the_bits_of_a_text() -> None:
    assert list(reading("k").read("v1", ["abcd"])) == [pytest.approx(1 / 4)]
    assert list(reading("").read("v1", ["abcd"])) == [None], "another version answered"


@pytest.mark.parametrize(("status", "words"), [(401, "wants an API key"), (400, "answers 400: too long")])
def test_a_server_that_refuses_says_why(status: int, words: str) -> None:
    reader = reading("", lambda request: httpx.Response(status, text="too long"))
    with pytest.raises(HostError, match=words):
        list(reader.read("v1", ["abcd"]))


def test_a_server_that_is_gone_is_told() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(HostError, match="does not answer: refused"):
        list(reading("", gone).read("v1", ["abcd"]))
