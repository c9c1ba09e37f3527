"""One expert's tensors as they are stored, wherever they come from, and what a kernel loads of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from actors.expert_maths import ExpertMaths
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError

# Letters: H hidden, I intermediate, U = 2·I with a gate and I without (rows of the first matrix).


class StoredExpert(NamedTuple):
    """Views that are valid while their file is mapped."""

    parts: Mapping[str, torch.Tensor]
    """By canonical part, see `cluster.expert_names`."""
    fused: bool
    """Whether they were cut out of one tensor of all experts, in which case they may lie transposed."""
    name: Callable[[str], str]
    """From a part to where it lies, for errors."""


@dataclass(frozen=True)
class CopiedCheckpoint(Checkpoint):
    """A checkpoint whose experts come from other hosts; `path` holds config.json alone."""

    fetch: Callable[[int, int], StoredExpert]
    """From layer and expert to what is stored; see `actors.peer_copy`."""
    dtypes: Mapping[int, frozenset[str]]

    def stored_dtypes(self, layer: int) -> frozenset[str]:
        """As the hosts have it from disk."""
        return self.dtypes[layer]


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One expert's matrices as [out, in] views; valid while the files are mapped."""

    gate_IH: torch.Tensor | None
    up_IH: torch.Tensor
    down_HI: torch.Tensor
    gate_I: torch.Tensor | None = None
    up_I: torch.Tensor | None = None
    down_H: torch.Tensor | None = None

    def copy_up(self, out_UH: torch.Tensor, *, alternate: bool) -> None:
        """Write gate and up into ``out_UH`` [U, H]: as two halves, or row by row in turn.

        U may be larger than needed (padding): each half is filled from its start.
        """
        _copy_rows(out_UH, self.gate_IH, self.up_IH, alternate)

    def copy_up_bias(self, out_U: torch.Tensor, *, alternate: bool) -> None:
        """Write the biases of gate and up into ``out_U`` [U], in the same order as their rows."""
        assert self.up_I is not None
        _copy_rows(out_U, self.gate_I, self.up_I, alternate)


def as_matrices(stored: StoredExpert, maths: ExpertMaths) -> ExpertMatrices:
    """What is stored as the matrices of ``maths``; CheckpointError if they are of another model."""
    parts, hidden, inner = stored.parts, maths.hidden, maths.intermediate
    bias = {part: parts.get(f"{part}.bias") for part in ("gate", "up", "down", "gate_up")}
    gated, biased = "gate" in parts or "gate_up" in parts, any(b is not None for b in bias.values())
    if gated != maths.has_gate or biased != maths.has_bias:
        raise CheckpointError(
            f"{stored.name('down')}: the expert's tensors ({', '.join(sorted(parts))}) do not fit "
            f"{type(maths.module).__name__}",
            _TWO_MODELS,
        )
    gate_bias, up_bias = bias["gate"], bias["up"]
    gate: torch.Tensor | None
    if "gate_up" in parts:
        gate, up = _split(_oriented(stored, "gate_up", maths, maths.up_rows, hidden), maths)
        if bias["gate_up"] is not None:
            gate_bias, up_bias = _split(bias["gate_up"], maths)
    else:
        gate = _oriented(stored, "gate", maths, inner, hidden) if maths.has_gate else None
        up = _oriented(stored, "up", maths, inner, hidden)
    down = _oriented(stored, "down", maths, hidden, inner)
    for part, rows in (("gate_up", maths.up_rows), ("gate", inner), ("up", inner), ("down", hidden)):
        found = bias[part]
        if found is not None and tuple(found.shape) != (rows,):
            raise CheckpointError(
                f"{stored.name(f'{part}.bias')} is {list(found.shape)} per expert, config.json says [{rows}]",
                _TWO_MODELS,
            )
    return ExpertMatrices(gate, up, down, gate_bias, up_bias, bias["down"])


_TWO_MODELS = "config.json and weights are of different models; fetch both again"


def _oriented(stored: StoredExpert, part: str, maths: ExpertMaths, rows: int, columns: int) -> torch.Tensor:
    """The matrix as [rows, columns]; only fused tensors may lie transposed."""
    tensor = stored.parts[part]
    # A square one shows no orientation: then it lies as in the module, as transformers assumes.
    as_in_module = stored.fused and maths.is_transposed
    for transposed in (as_in_module, not as_in_module) if stored.fused else (False,):
        matrix = tensor.t() if transposed else tensor
        if tuple(matrix.shape) == (rows, columns):
            return matrix
    raise CheckpointError(
        f"{stored.name(part)} is {list(tensor.shape)} per expert, config.json says {[rows, columns]}",
        _TWO_MODELS,
    )


def _split(both: torch.Tensor, maths: ExpertMaths) -> tuple[torch.Tensor, torch.Tensor]:
    if maths.is_concatenated:
        return both[: maths.intermediate], both[maths.intermediate :]
    return both[0::2], both[1::2]


def _copy_rows(out: torch.Tensor, gate: torch.Tensor | None, up: torch.Tensor, alternate: bool) -> None:
    rows = up.shape[0]
    if gate is None:
        out[:rows].copy_(up)
    elif alternate:
        out[0 : 2 * rows : 2].copy_(gate)
        out[1 : 2 * rows : 2].copy_(up)
    else:
        half = out.shape[0] // 2
        out[:rows].copy_(gate)
        out[half : half + rows].copy_(up)
