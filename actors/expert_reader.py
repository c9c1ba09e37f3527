"""Reads single experts of a checkpoint, whatever layout its files use, without copying more than them.

Files are memory-mapped while an :func:`open_layer` block lasts. What it yields are views of the mapping,
always as [out, in]; the caller copies them into its own memory, which also converts dtype and transposition
in one pass. Leaving the block unmaps the files, so their pages leave the process's resident memory.
Experts that are copied from other hosts are read in the same way, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from actors.expert_maths import ExpertMaths
from actors.stored_expert import CopiedCheckpoint, ExpertMatrices, StoredExpert, as_matrices
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError

ReadExpert: TypeAlias = Callable[[int], ExpertMatrices]
ReadVariant: TypeAlias = Callable[[Checkpoint, int, int], StoredExpert]
"""From checkpoint, layer and number to an expert that is not the checkpoint's, see `actors.variant_reader`."""


@contextmanager
def open_layer(
    checkpoint: Checkpoint, layer: int, maths: ExpertMaths, variant: ReadVariant | None = None
) -> Iterator[ReadExpert]:
    """Map the files of ``layer``; yields a function from an expert's number to its matrices.

    That raises CheckpointError if a file vanished or changed, if shapes contradict the model's config, or if no
    other host gives an expert that must be copied; and what `variant` raises, which reads those that are not the
    base checkpoint's.
    """
    num_experts = checkpoint.layout(layer).num_experts
    with ExitStack() as stack:
        stored = (
            (lambda expert: checkpoint.fetch(layer, expert))
            if isinstance(checkpoint, CopiedCheckpoint)
            else _mapped(checkpoint, layer, stack)
        )

        def read(expert: int) -> ExpertMatrices:
            if expert >= num_experts and variant is not None:
                return as_matrices(variant(checkpoint, layer, expert), maths)
            if not 0 <= expert < num_experts:
                raise CheckpointError(f"{checkpoint.path}: layer {layer} has no expert {expert}")
            return as_matrices(stored(expert), maths)

        yield read


def _mapped(checkpoint: Checkpoint, layer: int, stack: ExitStack) -> Callable[[int], StoredExpert]:
    """From expert to its tensors in the folder's files, which stay mapped until ``stack`` is closed."""
    layout = checkpoint.layout(layer)
    files: dict[str, Any] = {}
    stack.callback(files.clear)

    def where(part: str, expert: int) -> str:
        name = layout.tensor_name(part, expert)
        return f"{checkpoint.path / checkpoint.tensors[name].file}: {name}"

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
                f"{where(part, expert)} cannot be read: {error}",
                "the file vanished or changed since it was opened; fetch it again",
            ) from error

    def stored(expert: int) -> StoredExpert:
        parts = {part: read_part(part, expert) for part in layout.parts}
        return StoredExpert(parts, layout.fused, lambda part: where(part, expert))

    return stored
