"""Which host's memory an engine on a GPU has mapped, through tables that change and hosts that go.

Real servers on real sockets; the GPU's memory is anonymous files, which can be passed on and outlive who made them.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from actors import cuda_experts
from actors.buffers import Layout
from actors.cuda_experts import CudaExperts
from actors.expert_kernels import NoopLayer
from actors.host_server import HostServer
from actors.hosted_layer import HostedLayer
from actors.lenders import Source
from actors.route import Route
from actors.slot_format import SlotFormat
from cluster.errors import HostError
from cluster.frame import manifest_id
from cluster.messages import HostAddress

FORM = SlotFormat(8, 4, "float32", "plain", "silu")
MODEL, KEY, EXPERTS, LAYERS = "be" * 32, b"k" * 32, 4, (0, 3)


class Slots:
    """In place of CudaSlots: what a slot's memory says is who filled it."""

    def __init__(self, device: int, room: int, slot_bytes: int) -> None:
        self.slot_bytes, self.memory = slot_bytes, {}  # type: ignore[var-annotated]
        self._bytes = torch.zeros(room, -(-slot_bytes // 512) * 512, dtype=torch.uint8)

    def bytes(self) -> torch.Tensor:
        return self._bytes

    def take(self, slot: int) -> None:
        self.memory[slot] = "zeros"

    def alias(self, slot: int, other: Slots, of: int) -> None:
        self.memory[slot] = other.memory[of]

    def attach(self, slot: int, descriptor: int) -> None:
        with mmap.mmap(descriptor, 0) as seen:
            self.memory[slot] = bytes(seen).rstrip(b"\0").decode()
        os.close(descriptor)


class Exchange:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.dead: list[int] = []

    def close(self) -> None: ...


class Neighbours:
    """In place of GpuNeighbours: those hosts are asked that a test says."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.asked: dict[str, int] = {}
        self.pending, self.changed = 0, False

    def begin(self, addresses: list[HostAddress]) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def close(self) -> None: ...

    def look(self) -> bool:
        changed, self.changed = self.changed, False
        return changed

    def number(self, source: Source) -> int | None:
        return self.asked.get(source.host_id)

    def now(self, **asked: int) -> None:
        self.asked, self.changed = asked, True


class Host(HostServer):
    """Lends experts that say whose they are, to who asks for its GPU."""

    def __init__(self, name: str, gpu: str | None, holds: range) -> None:
        hosted = HostedLayer(NoopLayer(), tuple(holds), EXPERTS)
        super().__init__(
            name,
            dict.fromkeys(LAYERS, hosted),
            manifest=manifest_id(MODEL),
            model=MODEL,
            dtype="float32",
            hidden=8,
            key=KEY,
            blobs=object(),  # type: ignore[arg-type]
        )
        self._gpu, self._holds, self.asked = gpu, holds, 0
        self.address = HostAddress(name, "here", f"test-{secrets.token_hex(6)}-{name}", "", os.getpid())
        self.listen_unix(self.address.unix)

    def lend(self, gpu: str, layer: int, expert: int | None) -> tuple[dict[str, Any], int]:
        self.asked += 1
        if gpu != self._gpu or (expert is not None and expert not in self._holds):
            raise HostError("not here")
        if expert is None:
            return asdict(FORM), -1
        descriptor = os.memfd_create("test")
        os.write(descriptor, f"{self.host_id} {layer} {expert}".encode())
        return asdict(FORM), descriptor


@pytest.fixture
def hosts() -> Iterator[dict[str, Host]]:
    made = {
        "a": Host("a", "gpu", range(EXPERTS)),
        "b": Host("b", "gpu", range(EXPERTS)),
        "half": Host("half", "gpu", range(2)),
        "cpu": Host("cpu", None, range(EXPERTS)),
    }
    yield made
    for host in made.values():
        host.close()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> CudaExperts:
    monkeypatch.setattr(cuda_experts, "CudaSlots", Slots)
    monkeypatch.setattr(cuda_experts, "Exchange", Exchange)
    monkeypatch.setattr(cuda_experts, "GpuNeighbours", Neighbours)
    monkeypatch.setattr(cuda_experts, "gpu_name", lambda device: "gpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return CudaExperts(
        Layout(8, 8, 2, "float32"),
        dict.fromkeys(LAYERS, EXPERTS),
        device=torch.device("cpu"),
        model=MODEL,
        key=KEY,
        deadline_s=1.0,
    )


def use(engine: CudaExperts, *named: Host, holders: list[list[int]] | None = None) -> None:
    replicas = tuple(map(tuple, holders or [list(range(len(named)))] * EXPERTS))
    addresses = tuple(host.address for host in named)
    engine.use(Route(MODEL, 1, addresses, dict.fromkeys(LAYERS, replicas)), "here", 2.0)


def whose(engine: CudaExperts, layer: int = 0) -> list[str]:
    """Per expert the host whose memory is mapped; what the device is told must agree with it."""
    place = engine._place[layer].tolist()
    mapped = engine._layers.get(layer)
    memory: dict[int, str] = {} if mapped is None else mapped.slots.memory  # type: ignore[attr-defined]
    names = []
    for expert in range(EXPERTS):
        said = memory.get(expert, "zeros")
        assert (place[expert] == -1) == (said == "zeros"), (place, memory)
        if place[expert] != -1:
            assert place[expert] == expert and said.split()[1:] == [str(layer), str(expert)]
        names.append(said.split()[0])
    if mapped is not None:
        assert memory[EXPERTS] == "zeros"
    return names


def test_every_expert_is_mapped_from_a_host_on_the_gpu(engine: CudaExperts, hosts: dict[str, Host]) -> None:
    use(engine, hosts["cpu"], hosts["a"])
    assert whose(engine) == ["zeros"] * EXPERTS and engine.left == 2 * EXPERTS
    assert engine.settle() == 0
    assert [whose(engine, layer) for layer in LAYERS] == [["a"] * EXPERTS] * 2
    assert engine.mapped == {"a": 2 * EXPERTS}


def test_what_is_settled_asks_nobody(engine: CudaExperts, hosts: dict[str, Host]) -> None:
    use(engine, hosts["a"], hosts["b"])
    engine.settle()
    before = [host.asked for host in hosts.values()]
    use(engine, hosts["b"], hosts["a"])
    assert engine.settle() == 0 and whose(engine) == ["a"] * EXPERTS
    assert [host.asked for host in hosts.values()] == before


def test_a_dead_host_s_memory_stays_until_its_replica_s_is_there(
    engine: CudaExperts, hosts: dict[str, Host]
) -> None:
    use(engine, hosts["a"])
    engine.settle()
    hosts["a"].close()
    use(engine, hosts["b"])
    assert whose(engine) == ["a"] * EXPERTS
    lefts = [engine.left]
    while engine.left:
        lefts.append(engine.settle(1e-9))
        assert set(whose(engine)) <= {"a", "b"}
    assert lefts == sorted(lefts, reverse=True) and lefts[0] == 2 * EXPERTS
    assert whose(engine) == ["b"] * EXPERTS


def test_without_any_replica_a_dead_host_s_memory_is_kept(
    engine: CudaExperts, hosts: dict[str, Host]
) -> None:
    use(engine, hosts["a"])
    engine.settle()
    hosts["a"].close()
    use(engine, hosts["half"], holders=[[0], [0], [], []])
    engine.settle()
    assert whose(engine) == ["half", "half", "a", "a"]


def test_replicas_elsewhere_take_over_from_a_dead_host(engine: CudaExperts, hosts: dict[str, Host]) -> None:
    use(engine, hosts["a"])
    engine.settle()
    use(engine, hosts["cpu"])
    assert engine.settle() == 0
    assert whose(engine) == ["zeros"] * EXPERTS and engine.mapped == {}


def test_a_host_that_does_not_have_all_lends_what_it_has(engine: CudaExperts, hosts: dict[str, Host]) -> None:
    use(engine, hosts["half"], hosts["cpu"])
    engine.settle()
    assert whose(engine) == ["half", "half", "zeros", "zeros"]


def test_a_host_that_has_nothing_here_is_asked_once(engine: CudaExperts, hosts: dict[str, Host]) -> None:
    for _ in range(3):
        use(engine, hosts["cpu"])
        engine.settle()
    assert hosts["cpu"].asked == len(LAYERS)


def test_a_host_that_does_not_answer_is_dispatched_to_and_asked_again(
    engine: CudaExperts, hosts: dict[str, Host]
) -> None:
    away = hosts["b"].address
    hosts["b"].close()
    use(engine, hosts["b"])
    assert engine.settle() == 0 and whose(engine) == ["zeros"] * EXPERTS
    back = Host("b", "gpu", range(EXPERTS))
    try:
        assert back.address != away
        use(engine, back)
        engine.settle()
        assert whose(engine) == ["b"] * EXPERTS
    finally:
        back.close()


def test_rows_that_cannot_be_added_are_refused() -> None:
    with pytest.raises(HostError, match="bfloat16 or float32, not float16"):
        CudaExperts(
            Layout(8, 8, 2, "float16"), {}, device=torch.device("cpu"), model=MODEL, key=KEY, deadline_s=1.0
        )


def asked(engine: CudaExperts, layer: int = 0) -> list[int]:
    return engine._near[layer].tolist()


def test_the_first_replica_is_used_be_it_here_or_on_another_gpu(
    engine: CudaExperts, hosts: dict[str, Host]
) -> None:
    use(engine, hosts["a"], hosts["cpu"], holders=[[0, 1], [1, 0], [1], [0]])
    engine.settle()
    assert asked(engine) == [-1] * EXPERTS and engine.asked == {}
    neighbours: Any = engine._neighbours
    neighbours.now(cpu=2)
    engine.look()
    assert asked(engine) == [-1, 2, 2, -1] and asked(engine, 3) == [-1, 2, 2, -1]
    # What is here as well stays mapped, for when the other does not answer.
    assert whose(engine) == ["a", "a", "zeros", "a"]
    assert engine.asked == {"cpu": 4} and engine.mapped == {"a": 6}
    neighbours.now()
    engine.look()
    assert asked(engine) == [-1] * EXPERTS


def test_another_table_changes_who_is_asked_at_once(engine: CudaExperts, hosts: dict[str, Host]) -> None:
    neighbours: Any = engine._neighbours
    use(engine, hosts["a"], hosts["cpu"], holders=[[1, 0]] * EXPERTS)
    neighbours.now(cpu=0)
    engine.settle()
    assert asked(engine) == [0] * EXPERTS
    use(engine, hosts["a"], hosts["cpu"], holders=[[0, 1]] * EXPERTS)
    assert asked(engine) == [-1] * EXPERTS and whose(engine) == ["a"] * EXPERTS


def test_what_is_not_here_yet_is_asked_for_until_it_is(engine: CudaExperts, hosts: dict[str, Host]) -> None:
    neighbours: Any = engine._neighbours
    neighbours.now(cpu=1)
    use(engine, hosts["a"], hosts["cpu"])
    assert asked(engine) == [1] * EXPERTS
    engine.settle()
    assert asked(engine) == [-1] * EXPERTS and whose(engine) == ["a"] * EXPERTS
