"""Rows that want experts elsewhere go out and come back, in a stream and in a graph that is replayed."""

from __future__ import annotations

import pytest
import torch

from actors.buffers import Layout
from actors.cuda_exchange import Exchange

ROWS, HIDDEN, TOP_K, EXPERTS = 200, 256, 4, 16


def answer(layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Expert e of layer l multiplies by e + l; none is asked for by -1."""
    factor = torch.where(ids >= 0, ids + layer, 0).float()
    out.copy_((x.float() * (factor * weights).sum(1, keepdim=True)).to(x.dtype))


@pytest.fixture(params=["bfloat16", "float32"])
def exchange(request: pytest.FixtureRequest):
    made = Exchange(Layout(ROWS, HIDDEN, TOP_K, request.param), 0, 5.0)
    made.serve(answer)
    yield made
    torch.cuda.synchronize()
    made.close()


def operands(exchange: Exchange, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = getattr(torch, exchange.layout.dtype)
    x = torch.randn(rows, HIDDEN, device="cuda").to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS, device="cuda")[:TOP_K] for _ in range(rows)]).int()
    return x, torch.rand(rows, TOP_K, device="cuda"), ids


def run(exchange, layer, x, weights, ids, place, counts) -> torch.Tensor:
    nobody = torch.full_like(place, -1)
    places, local = exchange.post(layer, x, weights, ids, place, nobody, counts, EXPERTS)
    # Experts at hand do as those elsewhere.
    factor = torch.where(places < EXPERTS, places + layer, 0).float()
    y = (x.float() * (factor * local).sum(1, keepdim=True)).to(x.dtype)
    exchange.collect(y)
    return y


def check(got: torch.Tensor, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
    wanted = x.float() * ((ids + layer) * weights).sum(1, keepdim=True)
    error = (got.float() - wanted).norm() / wanted.norm()
    assert error < 1e-2, float(error)


@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("here", [0, 7, EXPERTS])
def test_every_share_is_added(exchange: Exchange, rows: int, here: int) -> None:
    place = torch.tensor([e if e < here else -1 for e in range(EXPERTS)], dtype=torch.int32, device="cuda")
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
    for layer in range(5):
        x, weights, ids = operands(exchange, rows)
        check(run(exchange, layer, x, weights, ids, place, counts), layer, x, weights, ids)
    assert int(counts.sum()) == 5 * rows * TOP_K
    assert exchange.lates == 0


def test_a_graph_is_replayed_with_other_rows_and_other_places(exchange: Exchange) -> None:
    place = torch.full((EXPERTS,), -1, dtype=torch.int32, device="cuda")
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
    x, weights, ids = operands(exchange, 8)
    run(exchange, 2, x, weights, ids, place, counts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(exchange, 2, x, weights, ids, place, counts)
    for here in (0, 3, EXPERTS, 9):
        new = operands(exchange, 8)
        for old, fresh in zip((x, weights, ids), new, strict=True):
            old.copy_(fresh)
        place.copy_(torch.tensor([e if e < here else -1 for e in range(EXPERTS)], dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        check(y, 2, x, weights, ids)


def test_a_thread_that_does_not_answer_hangs_nothing() -> None:
    late = Exchange(Layout(ROWS, HIDDEN, TOP_K, "float32"), 0, 0.2)
    release = []

    def never(*_: object) -> None:
        while not release:
            torch.ones(1).sum()

    late.serve(never)
    place = torch.full((EXPERTS,), -1, dtype=torch.int32, device="cuda")
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
    x, weights, ids = operands(late, 4)
    run(late, 0, x, weights, ids, place, counts)
    torch.cuda.synchronize()
    assert late.lates == 1
    release.append(True)
    late.close()


def test_what_a_thread_raises_becomes_zeros(exchange: Exchange) -> None:
    broken = Exchange(exchange.layout, 0, 5.0)

    def breaks(*_: object) -> None:
        raise RuntimeError("as a test wants it")

    broken.serve(breaks)
    place = torch.full((EXPERTS,), -1, dtype=torch.int32, device="cuda")
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
    x, weights, ids = operands(broken, 4)
    assert not run(broken, 0, x, weights, ids, place, counts).any()
    torch.cuda.synchronize()
    broken.close()
