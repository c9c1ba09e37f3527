"""Tensors that are copied as plain memory: whatever does not fit the connection is refused before any copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from actors.buffers import Layout
from actors.dispatch import Dispatcher
from actors.route import fixed_route
from cluster.errors import HostError
from cluster.messages import HostAddress

HIDDEN, TOP_K, ROWS = 8, 2, 3
Operands = list[torch.Tensor]


def operands(rows: int = ROWS) -> Operands:
    """x, weights, ids and out that fit."""
    return [
        torch.ones(rows, HIDDEN),
        torch.ones(rows, TOP_K),
        torch.zeros(rows, TOP_K, dtype=torch.int32),
        torch.empty(rows, HIDDEN),
    ]


@pytest.fixture(params=[1, 2], ids=["1-host", "2-hosts"])
def dispatcher(request: pytest.FixtureRequest) -> Dispatcher:
    """Connected to nobody: what gets past the check ends in a HostError."""
    hosts = [HostAddress(f"h{i}", "here", f"nobody-{i}", "", 0) for i in range(request.param)]
    route = fixed_route("ab" * 32, 1, hosts, {0: [0, request.param - 1]})
    layout = Layout(4, HIDDEN, TOP_K, "float32")
    return Dispatcher(route, layout, node_id="here", model="m", key=b"k", deadline_s=0.01)


def replaced(position: int, tensor: torch.Tensor) -> Operands:
    changed = operands()
    changed[position] = tensor
    return changed


WRONG: dict[str, tuple[Operands, str]] = {
    "half a row": (replaced(0, torch.ones(ROWS * HIDDEN - 4)), "x .*20.*rows of 8"),
    "x of another type": (replaced(0, torch.ones(ROWS, HIDDEN).double()), "x .*float64.*float32"),
    "x as large, of another type": (replaced(0, torch.ones(ROWS, HIDDEN, dtype=torch.int32)), "x .*int32"),
    "x with gaps": (replaced(0, torch.ones(ROWS, 2 * HIDDEN)[:, ::2]), "x .*not contiguous"),
    "too few weights": (replaced(1, torch.ones(ROWS, TOP_K - 1)), r"weights .*\(3, 1\).*3 rows"),
    "weights transposed": (replaced(1, torch.ones(TOP_K, ROWS).T), "weights .*not contiguous"),
    "weights in the model's type": (replaced(1, torch.ones(ROWS, TOP_K).bfloat16()), "weights .*bfloat16"),
    "ids of 64 bits": (replaced(2, torch.zeros(ROWS, TOP_K).long()), "ids .*int64.*int32"),
    "ids of another batch": (replaced(2, torch.zeros(ROWS + 1, TOP_K).int()), r"ids .*\(4, 2\).*3 rows"),
    "ids as floats": (replaced(2, torch.zeros(ROWS, TOP_K)), "ids .*float32.*int32"),
    "room for fewer sums": (replaced(3, torch.empty(ROWS - 1, HIDDEN)), r"out .*\(2, 8\).*3 rows"),
    "sums with gaps": (replaced(3, torch.empty(ROWS, 2 * HIDDEN)[:, ::2]), "out .*not contiguous"),
    "rows elsewhere": (replaced(0, torch.ones(ROWS, HIDDEN, device="meta")), "x .*meta"),
}


@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(dispatcher: Dispatcher, wrong: Operands, words: str) -> None:
    x, weights, ids, out = wrong
    with pytest.raises(ValueError, match=words):
        dispatcher(0, x, weights, ids, out)


@pytest.mark.parametrize("spoil", [lambda t: t[:-1], lambda t: t.repeat(2, 1)], ids=["shorter", "longer"])
@pytest.mark.parametrize("position", [1, 2, 3], ids=["weights", "ids", "out"])
def test_sizes_are_checked_in_every_call(
    dispatcher: Dispatcher, position: int, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Also for numbers of rows that were seen before, and for batches that go in several rounds."""
    for rows in (ROWS, 10):
        x, weights, ids, out = operands(rows)
        with pytest.raises(HostError, match="no living host"):
            dispatcher(0, x, weights, ids, out)
        wrong = operands(rows)
        wrong[position] = spoil(wrong[position])
        x, weights, ids, out = wrong
        with pytest.raises(ValueError, match="rows"):
            dispatcher(0, x, weights, ids, out)
