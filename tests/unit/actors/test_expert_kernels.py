"""Every combination of the flags that an experts class can have, and the kernels' own promises."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers.integrations import use_experts_implementation

from actors.expert_kernels import LayerExperts, NoopLayer, PairBuffers
from actors.expert_maths import ExpertMaths, inspect_module
from actors.expert_weights import pack_layer
from actors.vllm_cpu_kernel import vllm_cpu_isa, vllm_cpu_ops
from cluster.checkpoint import Checkpoint

HIDDEN, INNER, EXPERTS = 64, 96, 6
FLAGS = ("has_bias", "has_gate", "is_transposed", "is_concatenated")


def experts_class(activation: str, **flags: Any) -> type[nn.Module]:
    """An experts class as a model file would define it, with a gate of its own where rows alternate."""

    class Experts(nn.Module):
        def __init__(self, _: SimpleNamespace) -> None:
            super().__init__()
            rows = 2 * INNER if flags["has_gate"] else INNER
            name = "gate_up_proj" if flags["has_gate"] else "up_proj"
            self.num_experts = EXPERTS
            self.act_fn = getattr(functional, activation)
            shapes = {name: (rows, HIDDEN), "down_proj": (HIDDEN, INNER)}
            for parameter, shape in shapes.items():
                placed = shape[::-1] if flags["is_transposed"] else shape
                self.register_parameter(parameter, nn.Parameter(torch.randn(EXPERTS, *placed) / 8))
                if flags["has_bias"]:
                    self.register_parameter(f"{parameter}_bias", nn.Parameter(torch.randn(EXPERTS, shape[0])))

        def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    if flags["has_gate"] and not flags["is_concatenated"]:

        def alternating_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
            return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

        Experts._apply_gate = alternating_gate  # type: ignore[attr-defined]
    return use_experts_implementation(Experts, **flags)


def plain_reference(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The definition, one expert at a time, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)

    def linear(name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        matrix = getattr(module, name)[expert].double()
        result = rows @ (matrix if module.is_transposed else matrix.t())
        return result + getattr(module, f"{name}_bias")[expert].double() if module.has_bias else result

    for expert in range(EXPERTS):
        row, slot = (ids == expert).nonzero(as_tuple=True)
        inner = linear("gate_up_proj" if module.has_gate else "up_proj", expert, x[row].double())
        if not module.has_gate:
            inner = module.act_fn(inner)
        elif module.is_concatenated:
            inner = module.act_fn(inner[:, :INNER]) * inner[:, INNER:]
        else:
            inner = module.act_fn(inner[:, ::2]) * inner[:, 1::2]
        share = weights[row, slot, None].double() * linear("down_proj", expert, inner)
        # A row may name an expert twice.
        out.index_add_(0, row, share)
    return out


def save_experts(module: nn.Module, folder: Path) -> Checkpoint:
    config = {"model_type": "synthetic", "num_hidden_layers": 1, "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"model.layers.0.mlp.experts.{name}": p.detach() for name, p in module.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def random_rows(rows: int, local: int, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, expert ids with -1 for those at or above ``local``, and weights."""
    ids = torch.rand(rows, EXPERTS).argsort(dim=1)[:, :top_k]
    return torch.randn(rows, HIDDEN), torch.where(ids < local, ids, -1).int(), torch.rand(rows, top_k)


def run(layer: LayerExperts, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    layer.compute(x, slots, weights, out)
    return out


@pytest.mark.parametrize("values", list(itertools.product([False, True], repeat=4)))
@torch.no_grad()
def test_every_flag_combination_by_every_kernel(values: tuple[bool, ...], tmp_path: Path) -> None:
    flags = dict(zip(FLAGS, values, strict=True))
    torch.manual_seed(sum(1 << i for i, value in enumerate(values) if value))
    module = experts_class("gelu", **flags)(SimpleNamespace())
    checkpoint, maths = save_experts(module, tmp_path), inspect_module(module)
    kernels = ["grouped-mm", "module"]
    if vllm_cpu_isa(maths, torch.float32):
        kernels.append("vllm-cpu")
    # vLLM has the plain gates only.
    plain = flags["has_gate"] and flags["is_concatenated"] and vllm_cpu_ops() is not None
    assert (len(kernels) == 3) == plain
    for kernel, local, rows in itertools.product(kernels, (EXPERTS, 2), (1, 5, 70)):
        layer = pack_layer(checkpoint, 0, maths, range(local), torch.float32, kernel=kernel)
        x, slots, weights = random_rows(rows, local)
        expected = plain_reference(module, x, slots, weights).float()
        torch.testing.assert_close(run(layer, x, slots, weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_a_gate_is_named_by_what_it_computes(activation: str) -> None:
    flags = dict.fromkeys(FLAGS, False) | {"has_gate": True, "is_concatenated": True}
    maths = inspect_module(experts_class(activation, **flags)(SimpleNamespace()))
    assert maths.activation == (None if activation == "relu" else activation)


def gated(tmp_path: Path) -> tuple[nn.Module, Checkpoint, ExpertMaths]:
    torch.manual_seed(0)
    flags = dict.fromkeys(FLAGS, False) | {"has_gate": True, "is_concatenated": True}
    module = experts_class("silu", **flags)(SimpleNamespace())
    return module, save_experts(module, tmp_path), inspect_module(module)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", "grouped-mm", "module"])
def test_hosts_shares_add_up_and_repeat_bit_by_bit(kernel: str, tmp_path: Path) -> None:
    module, checkpoint, maths = gated(tmp_path)
    hosts = ([0, 3, 4], [5, 1, 2])
    x, ids, weights = random_rows(17, EXPERTS)
    total = torch.zeros_like(x)
    for local in hosts:
        layer = pack_layer(checkpoint, 0, maths, local, torch.float32, kernel=kernel)
        slot_of = torch.full((EXPERTS,), -1, dtype=torch.int32)
        slot_of[local] = torch.arange(len(local), dtype=torch.int32)
        share = run(layer, x, slot_of[ids], weights)
        run(layer, *random_rows(40, 3))  # other rows in between must leave nothing behind
        assert torch.equal(run(layer, x, slot_of[ids], weights), share)
        total += share
    expected = plain_reference(module, x, ids, weights).float()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["auto", "grouped-mm", "module", "noop"])
def test_no_rows_and_no_local_slots(kernel: str, tmp_path: Path) -> None:
    _, checkpoint, maths = gated(tmp_path)
    layer = (
        NoopLayer(weighted=True)
        if kernel == "noop"
        else pack_layer(checkpoint, 0, maths, [1], torch.float32, kernel=kernel)
    )
    x, _, weights = random_rows(4, 0)
    assert run(layer, x, torch.full((4, 3), -1, dtype=torch.int32), weights).count_nonzero() == 0
    assert run(layer, x[:0], torch.empty(0, 3, dtype=torch.int32), weights[:0]).shape == (0, HIDDEN)


def test_rows_may_lie_in_shared_memory(tmp_path: Path) -> None:
    _, checkpoint, maths = gated(tmp_path)
    layer = pack_layer(checkpoint, 0, maths, range(EXPERTS), torch.float32)
    x, slots, weights = random_rows(5, 4)
    shared = np.zeros((2, 5, HIDDEN), dtype=np.float32)
    x_shared, out_shared = torch.from_numpy(shared)
    x_shared.copy_(x)
    layer.compute(x_shared, slots, weights, out_shared)
    assert torch.equal(out_shared, run(layer, x, slots, weights))


def test_noop_returns_rows_or_their_share() -> None:
    x, slots, weights = random_rows(6, 3)
    assert torch.equal(run(NoopLayer(), x, slots, weights), x)
    share = torch.where(slots >= 0, weights, 0).sum(dim=1, keepdim=True)
    assert torch.equal(run(NoopLayer(weighted=True), x, slots, weights), x * share)


@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=40), half=st.booleans())
@settings(max_examples=50, deadline=None)
def test_pairs_are_added_to_their_rows(rows: list[int], half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    buffers = PairBuffers(dtype, (4,))
    (y,) = buffers.take(len(rows))
    assert y.shape == (len(rows), 4)
    y.copy_(torch.arange(y.numel()).view(y.shape) % 7)
    out = torch.full((6, 4), torch.nan, dtype=dtype)
    buffers.add_pairs(torch.tensor(rows), y, out)
    expected = torch.stack(
        [y[[i for i, r in enumerate(rows) if r == row]].float().sum(0) for row in range(6)]
    )
    assert torch.equal(out, expected.to(dtype))
