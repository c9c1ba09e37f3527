"""An engine asks a host on another GPU: real servers, real memory; where there is one GPU, it plays both."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator

import pytest
import torch

from actors.buffers import Layout
from actors.cuda_exchange import Exchange
from actors.cuda_layer import CudaLayer
from actors.gpu_neighbours import GpuNeighbours
from actors.host_server import HostServer
from actors.hosted_layer import HostedLayer
from actors.lenders import Source
from actors.slot_format import SlotFormat, run_experts, skipping
from cluster.frame import manifest_id
from cluster.messages import HostAddress

pytest.importorskip("vllm")

MODEL, KEY = "be" * 32, b"k" * 32
HIDDEN, TOP_K, EXPERTS, LAYERS, ROWS = 256, 4, 8, (0, 3), 700
FORM = SlotFormat(HIDDEN, 128, "bfloat16", "plain", "silu")
LAYOUT = Layout(ROWS, HIDDEN, TOP_K, "bfloat16")
# The neighbour has these, the mailbox answers for the others.
HELD = (1, 2, 3, 5, 7)


class Mesh:
    """A host on the last GPU, and an engine's exchange on the first."""

    def __init__(self, deadline_s: float) -> None:
        there = torch.cuda.device_count() - 1
        self.layers = {layer: HostedLayer(_experts(there), HELD, EXPERTS) for layer in LAYERS}
        self.everywhere = {layer: _whole(hosted) for layer, hosted in self.layers.items()}
        unix = f"test-{secrets.token_hex(6)}"
        self.server = HostServer(
            "b", self.layers, manifest=manifest_id(MODEL), model=MODEL, dtype="bfloat16", hidden=HIDDEN, key=KEY,
            blobs=object(),  # type: ignore[arg-type]
        )  # fmt: skip
        self.server.listen_unix(unix)
        self.address = HostAddress("b", "here", unix, "", os.getpid())
        self.exchange = Exchange(LAYOUT, 0, 20.0, near_deadline_s=deadline_s)
        self.exchange.serve(self.answer)
        self.neighbours = GpuNeighbours(self.exchange, LAYOUT, 0, "another", model=MODEL, key=KEY)
        self.mailed = 0
        self.beside, self.skipping = torch.cuda.Stream(0), skipping(EXPERTS, torch.device("cuda:0"))
        self.place = torch.full((EXPERTS,), -1, dtype=torch.int32, device="cuda:0")
        self.near = self.place.clone()
        self.counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda:0")

    def begin(self) -> None:
        self.neighbours.begin([self.address])
        self.wait()

    def wait(self) -> None:
        end = time.monotonic() + 60
        while self.neighbours.number(Source.of(self.address)) is None:
            assert time.monotonic() < end
            self.neighbours.wait(0.1)
            torch.cuda.synchronize(0)
            self.neighbours.look()
        number = self.neighbours.number(Source.of(self.address))
        near = [number if expert in HELD else -1 for expert in range(EXPERTS)]
        self.near.copy_(torch.tensor(near, dtype=torch.int32))

    def answer(self, layer, x, weights, ids, out) -> None:
        """The mailbox's: everything is had there too."""
        self.mailed += 1
        wanted = torch.where(ids >= 0, ids, EXPERTS)
        # Behind the stream that waits for it there would be no end.
        with torch.cuda.stream(self.beside):
            sums = run_experts(
                self.everywhere[layer], "silu", x.cuda(), wanted.int().cuda(), weights.cuda(), self.skipping
            )
            out.copy_(sums)

    def run(self, layer: int, x, weights, ids) -> torch.Tensor:
        self.exchange.post(layer, x, weights, ids, self.place, self.near, self.counts, EXPERTS)
        y = torch.zeros_like(x)
        self.exchange.collect(y)
        return y

    def check(self, got, layer: int, x, weights, ids) -> None:
        wanted = run_experts(self.everywhere[layer], "silu", x, ids, weights, None).float()
        error = float((got.float() - wanted).norm() / wanted.norm())
        assert error < 2e-2, error

    def close(self) -> None:
        torch.cuda.synchronize(0)
        self.exchange.close()
        self.neighbours.close()
        self.server.close()


def _experts(device: int) -> CudaLayer:
    made = CudaLayer(FORM, EXPERTS, device)
    for slot in range(EXPERTS):
        made.slots.take(slot)
        made.tensors.up_SUH[slot].normal_(std=0.05)
        made.tensors.down_SHI[slot].normal_(std=0.05)
    torch.cuda.synchronize(device)
    return made


def _whole(hosted: HostedLayer):
    """All experts on the first GPU, by number: those that are held, and any for the others."""
    kept = hosted.experts
    assert isinstance(kept, CudaLayer)
    slots = torch.tensor([hosted.slots.get(expert, EXPERTS - 1) for expert in range(EXPERTS)])
    up, down = (tensor[slots.to(tensor.device)].to("cuda:0") for tensor in kept.tensors[:2])
    return type(kept.tensors)(up, down, None, None)


def operands(rows: int):
    x = torch.randn(rows, HIDDEN, device="cuda:0").bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, device="cuda:0")[:TOP_K] for _ in range(rows)]).int()
    return x, torch.rand(rows, TOP_K, device="cuda:0"), ids


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    made = Mesh(10.0)
    try:
        made.begin()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 200, ROWS])
def test_a_neighbour_s_share_is_added(mesh: Mesh, rows: int) -> None:
    for layer in [*LAYERS, *LAYERS, LAYERS[0], LAYERS[0]]:
        asked = operands(rows)
        mesh.check(mesh.run(layer, *asked), layer, *asked)
    assert mesh.exchange.dead == [] and mesh.exchange.lates == 0
    assert int(mesh.counts.sum()) == 6 * rows * TOP_K


def test_nobody_else_is_asked_for_what_a_neighbour_has(mesh: Mesh) -> None:
    x, weights, _ = operands(5)
    ids = torch.tensor([HELD[:TOP_K]] * 5, dtype=torch.int32, device="cuda:0")
    mesh.check(mesh.run(3, x, weights, ids), 3, x, weights, ids)
    assert mesh.mailed == 0


def test_a_graph_is_replayed_with_a_neighbour(mesh: Mesh) -> None:
    asked = operands(8)
    mesh.run(0, *asked)
    torch.cuda.synchronize(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = mesh.run(0, *asked)
    for _ in range(20):
        for old, new in zip(asked, operands(8), strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize(0)
        mesh.check(y, 0, *asked)


def test_what_a_neighbour_owes_is_asked_of_others_and_it_comes_back() -> None:
    mesh = Mesh(0.2)
    try:
        mesh.begin()
        asked = operands(6)
        mesh.check(mesh.run(0, *asked), 0, *asked)
        kept = dict(mesh.layers)
        mesh.layers.clear()  # it has nothing to answer with
        before = mesh.mailed
        mesh.check(mesh.run(0, *asked), 0, *asked)
        torch.cuda.synchronize(0)
        assert mesh.exchange.dead == [0] and mesh.mailed >= before + 1
        # And without a wait from then on.
        began = time.monotonic()
        for _ in range(5):
            mesh.check(mesh.run(3, *asked), 3, *asked)
        assert mesh.exchange.lates == 0
        assert time.monotonic() - began < 5 * 0.2
        mesh.layers.update(kept)
        mesh.wait()
        before = mesh.mailed
        x, weights, _ = asked
        ids = torch.tensor([HELD[:TOP_K]] * 6, dtype=torch.int32, device="cuda:0")
        mesh.check(mesh.run(0, x, weights, ids), 0, x, weights, ids)
        torch.cuda.synchronize(0)
        assert mesh.exchange.dead == [] and mesh.mailed == before
    finally:
        mesh.close()


def test_an_expert_that_a_neighbour_does_not_have_is_asked_of_others(mesh: Mesh) -> None:
    mesh.near.fill_(0)
    asked = operands(9)
    mesh.check(mesh.run(0, *asked), 0, *asked)
    torch.cuda.synchronize(0)
    assert mesh.exchange.dead == [0] and mesh.mailed == 1
