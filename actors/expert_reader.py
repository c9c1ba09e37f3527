"""Reads single experts out of a checkpoint, whatever layout its files use, without copying more than them.

Files are memory-mapped while an :func:`open_layer` block lasts. What it yields are views of the mapping,
always as [out, in]; the caller copies them into its own memory, which also converts dtype and transposition
in one pass. Leaving the block unmaps the files, so their pages leave the process's resident memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from actors.expert_maths import ExpertMaths
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError

# Letters: H hidden, I intermediate, U = 2·I with a gate and I without (rows of the first matrix).


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


ReadExpert: TypeAlias = Callable[[int], ExpertMatrices]


@contextmanager
def open_layer(checkpoint: Checkpoint, layer: int, maths: ExpertMaths) -> Iterator[ReadExpert]:
    """Map the files of ``layer``; yields a function from expert index to its matrices.

    Raises CheckpointError if a file vanished or changed, or if shapes contradict the model's config.
    """
    layout = checkpoint.layout(layer)
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def read_part(part: str, expert: int) -> torch.Tensor:
            name = layout.tensor_name(part, expert)
            file = checkpoint.tensors[name].file
            try:
                if file not in files:
                    files[file] = stack.enter_context(safe_open(checkpoint.path / file, framework="pt"))
                if layout.fused:
                    return files[file].get_slice(name)[expert]
                return files[file].get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{checkpoint.path / file}: {name} cannot be read: {error}",
                    "the file vanished or changed since it was opened; fetch it again",
                ) from error

        def oriented(part: str, expert: int, rows: int, columns: int) -> torch.Tensor:
            """The matrix as [rows, columns]; only fused tensors may lie transposed."""
            tensor = read_part(part, expert)
            # A square one shows no orientation: then it lies as in the module, as transformers assumes.
            as_in_module = layout.fused and maths.is_transposed
            for transposed in (as_in_module, not as_in_module) if layout.fused else (False,):
                matrix = tensor.t() if transposed else tensor
                if tuple(matrix.shape) == (rows, columns):
                    return matrix
            raise _wrong_shape(checkpoint, layout.tensor_name(part, expert), tensor, (rows, columns))

        def read(expert: int) -> ExpertMatrices:
            if not 0 <= expert < layout.num_experts:
                raise CheckpointError(f"{checkpoint.path}: layer {layer} has no expert {expert}")
            hidden, inner = maths.hidden, maths.intermediate
            bias = {
                part: read_part(f"{part}.bias", expert)
                for part in ("gate", "up", "down", "gate_up")
                if f"{part}.bias" in layout.parts
            }
            gate_bias, up_bias = bias.get("gate"), bias.get("up")
            gate: torch.Tensor | None
            if "gate_up" in layout.parts:
                both = oriented("gate_up", expert, maths.up_rows, hidden)
                gate, up = _split(both, maths)
                if "gate_up" in bias:
                    gate_bias, up_bias = _split(bias["gate_up"], maths)
            else:
                gate = oriented("gate", expert, inner, hidden) if maths.has_gate else None
                up = oriented("up", expert, inner, hidden)
            down = oriented("down", expert, hidden, inner)
            return ExpertMatrices(gate, up, down, gate_bias, up_bias, bias.get("down"))

        _check_parts(checkpoint, layer, maths)
        yield read
        files.clear()


def _check_parts(checkpoint: Checkpoint, layer: int, maths: ExpertMaths) -> None:
    parts = checkpoint.layout(layer).parts
    gated = "gate" in parts or "gate_up" in parts
    biased = any(part.endswith(".bias") for part in parts)
    if gated != maths.has_gate or biased != maths.has_bias:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors of layer {layer} ({', '.join(sorted(parts))}) do not fit "
            f"{type(maths.module).__name__}",
            "config.json and weights are of different models; fetch both again",
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


def _wrong_shape(
    checkpoint: Checkpoint, name: str, tensor: torch.Tensor, wanted: tuple[int, int]
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path / checkpoint.tensors[name].file}: {name} is {list(tensor.shape)} per expert, "
        f"config.json says {list(wanted)}",
        "config.json and weights are of different models; fetch both again",
    )
