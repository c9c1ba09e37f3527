"""Float32 rows over bfloat16 weights: what float32 weights give, whatever rows are computed together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from actors import bf16_kernel
from actors.bf16_kernel import Bf16WeightsLayer, pack, unpack
from actors.expert_kernels import LayerExperts
from actors.expert_weights import build_layer
from actors.stored_expert import ExpertMatrices
from cluster.checkpoint import Checkpoint
from cluster.errors import HostError
from tests.tiny_models import make_tiny

HIDDEN, INNER, EXPERTS, TOP_K = 64, 96, 6, 3
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


class Weights:
    """Random bfloat16 experts, with their definition in float64."""

    def __init__(self, scale: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gate, self.up, self.down = (
            (torch.randn(EXPERTS, *shape, generator=generator) * scale).bfloat16()
            for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        )

    def layer(self, experts: list[int], *, vectors_only: bool) -> Bf16WeightsLayer:
        layer = Bf16WeightsLayer(len(experts), HIDDEN, INNER, vectors_only=vectors_only)
        for slot, expert in enumerate(experts):
            layer.put(slot, ExpertMatrices(self.gate[expert], self.up[expert], self.down[expert]))
        return layer

    def expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for row, slot in torch.nonzero(ids >= 0).tolist():
            gate, up, down = (part[ids[row, slot]].double() for part in (self.gate, self.up, self.down))
            inner = functional.silu(gate @ x[row].double()) * (up @ x[row].double())
            out[row] += weights[row, slot].double() * (down @ inner)
        return out


def routing(
    rows: int, local: int = EXPERTS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    weights = torch.rand(rows, TOP_K, generator=generator)
    return (
        torch.randn(rows, HIDDEN, generator=generator),
        torch.where(ids < local, ids, -1).int().contiguous(),
        weights,
    )


def run(layer: LayerExperts, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    layer.compute(x, slots, weights, out)
    return out


# On a processor without AMX both are the same.
both_ways = pytest.mark.parametrize("vectors_only", [False, True], ids=["tiles", "vectors"])


@needs_compiler
@both_ways
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 9, 70, 300])
@pytest.mark.parametrize("local", [EXPERTS, 2, 0])
def test_equals_the_definition(rows: int, local: int, vectors_only: bool) -> None:
    weights = Weights()
    x, slots, routed = routing(rows, local, seed=rows)
    out = run(weights.layer(list(range(max(local, 1))), vectors_only=vectors_only), x, slots, routed)
    torch.testing.assert_close(out.double(), weights.expected(x, slots, routed), rtol=1e-5, atol=1e-6)


@needs_compiler
@both_ways
def test_a_row_does_not_depend_on_its_company(vectors_only: bool) -> None:
    layer = Weights().layer(list(range(EXPERTS)), vectors_only=vectors_only)
    x, slots, weights = routing(70)
    together = run(layer, x, slots, weights)
    for row in range(70):
        one = slice(row, row + 1)
        assert torch.equal(run(layer, x[one], slots[one], weights[one])[0], together[row])


@needs_compiler
@both_ways
def test_two_experts_give_the_same_bits_on_one_host_or_on_two(vectors_only: bool) -> None:
    """A host's death moves an expert to another one in the middle of an answer."""
    layer = Weights().layer(list(range(EXPERTS)), vectors_only=vectors_only)
    x, slots, weights = routing(70)
    slots, weights = slots[:, :2].contiguous(), weights[:, :2].contiguous()
    whole = run(layer, x, slots, weights)
    here = slots < EXPERTS // 2
    parts = [run(layer, x, torch.where(of, slots, -1), weights) for of in (here, ~here)]
    assert torch.equal(parts[0] + parts[1], whole) and torch.equal(parts[1] + parts[0], whole)


@needs_compiler
@both_ways
def test_gates_that_are_huge_or_not_a_number(vectors_only: bool) -> None:
    weights = Weights(scale=30.0)
    layer = weights.layer(list(range(EXPERTS)), vectors_only=vectors_only)
    x, slots, routed = routing(20)
    out = run(layer, x * 100, slots, routed)
    expected = weights.expected(x * 100, slots, routed)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    x[3] = torch.nan
    out = run(layer, x, slots, routed)
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()


def test_packing_loses_nothing() -> None:
    matrix = torch.arange(32 * 8).view(32, 8).bfloat16()
    panels = torch.empty(2, 4, 16, 2, dtype=torch.bfloat16)
    pack(matrix, panels)
    assert torch.equal(unpack(panels), matrix)
    assert panels[1, 2, 5].tolist() == matrix[21, 4:6].tolist()


def stored(folder: Path, dtype: str, **config: object) -> Checkpoint:
    """A tiny Mixtral whose weights lie on disk in `dtype`."""
    return Checkpoint.open(make_tiny("mixtral", folder, dtype=dtype, **config))


@needs_compiler
def test_chosen_for_float32_over_bfloat16_alone(tmp_path: Path) -> None:
    plain = stored(tmp_path / "plain", "bfloat16")
    assert build_layer(plain, 0, [1, 0], torch.float32).kernel == "bf16-weights"
    assert build_layer(plain, 0, [1, 0], torch.bfloat16).kernel != "bf16-weights"
    assert build_layer(stored(tmp_path / "full", "float32"), 0, [0], torch.float32).kernel != "bf16-weights"
    gelu = stored(tmp_path / "gelu", "bfloat16", hidden_act="gelu")
    assert build_layer(gelu, 0, [0], torch.float32).kernel != "bf16-weights"
    with pytest.raises(HostError, match="bf16-weights"):
        build_layer(gelu, 0, [0], torch.float32, kernel="bf16-weights")


@needs_compiler
@torch.no_grad()
def test_the_same_from_a_checkpoint_as_by_the_wide_kernel(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, "bfloat16")
    narrow = build_layer(checkpoint, 0, [3, 1], torch.float32)
    wide = build_layer(checkpoint, 0, [3, 1], torch.float32, kernel="grouped-mm")
    assert narrow.weight_bytes * 2 == wide.weight_bytes
    x = torch.randn(9, checkpoint.hidden_size)
    slots, weights = torch.randint(-1, 2, (9, 2)).int(), torch.rand(9, 2)
    torch.testing.assert_close(
        run(narrow, x, slots, weights), run(wide, x, slots, weights), rtol=1e-5, atol=1e-5
    )


def test_without_a_compiler_weights_are_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    bf16_kernel.kernel.cache_clear()
    try:
        layer = build_layer(stored(tmp_path, "bfloat16"), 0, [0], torch.float32)
        assert layer.kernel != "bf16-weights"
    finally:
        bf16_kernel.kernel.cache_clear()
