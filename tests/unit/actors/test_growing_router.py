"""A router with room for more experts chooses as one that has as many would."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.dense_weights import more_rows, routers_of, tensors
from actors.growing_router import GrowingRouter, Rows, check
from cluster.errors import CheckpointError
from tests.unit.cluster.versions import tiny

HIDDEN, SIZE, SPARE = 8, 4, 2


class Softmax:
    """Top-2 as Mixtral's."""

    top_k = 2

    def select_experts(
        self, *, hidden_states: torch.Tensor, router_logits: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert others == {"input_ids": None}
        weights, ids = router_logits.float().softmax(-1).topk(2)
        return weights / weights.sum(-1, keepdim=True), ids


def growing(dtype: torch.dtype) -> tuple[GrowingRouter, Rows]:
    rows = Rows(SIZE, torch.zeros(SPARE, HIDDEN, dtype=dtype), torch.zeros(SIZE + SPARE))
    rows.use(None, ())
    return GrowingRouter(Softmax(), rows.rows_SH, rows.mask), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("more", "retired"), [(0, ()), (1, ()), (2, (0, 4)), (0, (1, 3)), (2, ())])
def test_it_chooses_among_the_experts_of_the_version(
    dtype: torch.dtype, more: int, retired: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    router, rows = growing(dtype)
    x, gate = torch.randn(64, HIDDEN, dtype=dtype), torch.randn(SIZE + more, HIDDEN, dtype=dtype)
    rows.use(torch.randn(SPARE, HIDDEN), (2,))  # of a version before
    rows.use(gate[SIZE:] if more else None, retired)
    weights, ids = router.select_experts(hidden_states=x, router_logits=x @ gate[:SIZE].T, input_ids=None)
    kept = [expert for expert in range(SIZE + more) if expert not in retired]
    wanted, among = Softmax().select_experts(hidden_states=x, router_logits=x @ gate[kept].T, input_ids=None)
    assert torch.equal(ids, torch.tensor(kept)[among])
    torch.testing.assert_close(weights, wanted)
    assert router.top_k == 2


def test_a_version_for_which_there_is_no_room_is_refused() -> None:
    _, rows = growing(torch.float32)
    with pytest.raises(CheckpointError, match="has 3 experts more than the checkpoint, there is room for 2"):
        rows.use(torch.zeros(3, HIDDEN), ())


@pytest.mark.parametrize(
    "router",
    [
        SimpleNamespace(e_score_correction_bias=torch.zeros(4)),
        SimpleNamespace(num_expert_group=4, topk_group=2),
        SimpleNamespace(use_grouped_topk=True, num_expert_group=4, topk_group=2),
        SimpleNamespace(custom_routing_function=print),
    ],
)
def test_a_router_of_another_kind_is_refused(router: Any) -> None:
    check("layer 3", SimpleNamespace(use_grouped_topk=True, num_expert_group=1, topk_group=1))
    check("layer 3", SimpleNamespace(use_grouped_topk=False, num_expert_group=4))
    with pytest.raises(CheckpointError, match="layer 3 chooses experts by groups"):
        check("layer 3", router)


def test_a_longer_router_is_loaded_in_two_parts(tmp_path: Path) -> None:
    checkpoint, file = tiny.base(tmp_path), tmp_path / "gate.safetensors"
    gate = torch.arange(6.0 * tiny.HIDDEN).reshape(6, tiny.HIDDEN)
    save_file({tiny.GATE: gate}, file)
    files = {tiny.GATE: str(file)}
    assert [len(rows) for _, rows in tensors(checkpoint, [tiny.GATE], files)] == [tiny.EXPERTS]
    (more,) = more_rows(checkpoint, routers_of(checkpoint, files)).items()
    assert more[0] == 1 and torch.equal(more[1], gate[tiny.EXPERTS :])
    save_file({tiny.GATE: gate[: tiny.EXPERTS]}, file)
    assert more_rows(checkpoint, routers_of(checkpoint, files)) == {} == more_rows(checkpoint, {})
