"""Which hosts on other GPUs an engine asks: through tables that change, hosts that are late, or are none."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors import gpu_neighbours, json_stream
from actors.buffers import Layout
from actors.cuda_exchange import MOST_NEIGHBOURS
from actors.expert_kernels import NoopLayer
from actors.gpu_neighbours import GpuNeighbours
from actors.handshake import dial_to_copy
from actors.host_server import HostServer
from actors.hosted_layer import HostedLayer
from actors.lenders import Source
from actors.streams import open_stream
from cluster.frame import manifest_id
from cluster.messages import HostAddress


class Exchange:
    def __init__(self) -> None:
        self.dead: list[int] = []
        self.rows: dict[int, str] = {}

    def set_neighbour(self, number: int, row: Any) -> None:
        if row is None:
            del self.rows[number]
            self.dead = [other for other in self.dead if other != number]
        else:
            assert number not in self.rows
            self.rows[number] = row


class Host:
    """In place of a connection to one."""

    def __init__(self, source: Source) -> None:
        self.source, self.open = source, True

    def row(self, parts: object) -> str:
        return self.source.host_id

    def close(self) -> None:
        assert self.open
        self.open = False


class Engine(GpuNeighbours):
    """Asks whom a test lets answer."""

    def __init__(self, answer: Callable[[Source], None]) -> None:
        self.exchange, self.hosts = Exchange(), list[Host]()
        self._answer = answer
        exchange: Any = self.exchange
        super().__init__(exchange, Layout(8, 8, 2, "float32"), 0, "gpu", model="m", key=b"k")

    def _connect(self, source: Source, address: HostAddress) -> Any:
        self._answer(source)
        self.hosts.append(Host(source))
        return self.hosts[-1]

    def settle(self) -> None:
        while self.pending:
            self.wait(5.0)
            self.look()


def address(name: str, pid: int = 1) -> HostAddress:
    return HostAddress(name, "here", name, "", pid)


def asked(engine: Engine) -> list[str]:
    named = sorted(engine.exchange.rows.values())
    assert engine.pending or named == sorted(host.source.host_id for host in engine.hosts if host.open)
    return named


def anybody(source: Source) -> None: ...


def test_hosts_of_the_table_are_asked_and_those_that_left_are_not() -> None:
    engine = Engine(anybody)
    engine.begin([address("a"), address("b")])
    assert engine.pending == 2 and asked(engine) == []
    engine.settle()
    assert asked(engine) == ["a", "b"]
    numbers = {name: engine.number(Source(name, 1)) for name in "ab"}
    engine.begin([address("b"), address("c")])
    engine.settle()
    assert asked(engine) == ["b", "c"]
    assert engine.number(Source("b", 1)) == numbers["b"] and engine.number(Source("a", 1)) is None
    engine.close()
    assert asked(engine) == []


def test_a_host_that_was_started_again_is_another() -> None:
    engine = Engine(anybody)
    engine.begin([address("a", 1)])
    engine.settle()
    engine.begin([address("a", 2)])
    assert engine.number(Source("a", 1)) is None
    engine.settle()
    assert asked(engine) == ["a"] and engine.number(Source("a", 2)) is not None


def test_a_host_that_is_none_is_asked_once() -> None:
    calls = []

    def refuses(source: Source) -> None:
        calls.append(source.host_id)
        raise json_stream.RefusedError("has no experts on a GPU")

    engine = Engine(refuses)
    for _ in range(3):
        engine.begin([address("cpu")])
        engine.settle()
        engine.look()
    assert calls == ["cpu"] and asked(engine) == []


def test_who_did_not_answer_in_time_is_let_go_and_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_neighbours, "_AGAIN_S", 3600.0)
    engine = Engine(anybody)
    engine.begin([address("a"), address("b")])
    engine.settle()
    late = engine.number(Source("a", 1))
    assert late is not None
    engine.exchange.dead = [late]
    assert engine.look() and asked(engine) == ["b"]
    assert not engine.look() and engine.pending == 0
    engine._again[Source("a", 1)] = 0.0
    engine.look()
    engine.settle()
    assert asked(engine) == ["a", "b"]


def test_a_host_that_can_not_be_reached_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = [OSError("nobody there"), ValueError("anything else")]

    def sometimes(source: Source) -> None:
        if fails:
            raise fails.pop()

    engine = Engine(sometimes)
    monkeypatch.setattr(gpu_neighbours, "_AGAIN_S", 0.0)
    engine.begin([address("a")])
    engine.settle()
    assert asked(engine) == ["a"] and not fails


def test_an_answer_of_a_host_that_left_meanwhile_is_dropped() -> None:
    engine = Engine(anybody)
    engine.begin([address("a")])
    engine.wait(5.0)
    engine.begin([])
    engine.settle()
    assert asked(engine) == [] and len(engine.hosts) == 1


def test_there_are_never_more_than_the_device_has_room_for() -> None:
    engine = Engine(anybody)
    engine.begin([address(f"h{number}") for number in range(MOST_NEIGHBOURS + 3)])
    engine.settle()
    assert len(asked(engine)) == MOST_NEIGHBOURS
    engine.look()
    assert engine.pending == 0


def test_a_host_without_a_gpu_refuses_and_the_connection_stays() -> None:
    model, key = "be" * 32, b"k" * 32
    server = HostServer(
        "cpu",
        {0: HostedLayer(NoopLayer(), (0, 1), 2)},
        manifest=manifest_id(model),
        model=model,
        dtype="float32",
        hidden=8,
        key=key,
        blobs=object(),  # type: ignore[arg-type]
    )
    there = HostAddress("cpu", "here", f"test-{secrets.token_hex(6)}", "", 1)
    server.listen_unix(there.unix)
    try:
        with open_stream(there, True, 5.0) as sock, Path("/dev/null").open("rb") as memory:
            dial_to_copy(sock, key, model)
            for _ in range(2):
                json_stream.send(sock, {"ask": "exchange", "gpu": "gpu"}, memory.fileno())
                with pytest.raises(json_stream.RefusedError, match="host cpu has no experts on a GPU"):
                    json_stream.receive(sock)
    finally:
        server.close()
