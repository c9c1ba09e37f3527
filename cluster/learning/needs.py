"""What a training takes, told before it begins; pure functions of the checkpoint's headers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError

_FLOAT: Final = 4
# Of all experts' weights, that are trained at most in what is asked for here; a training may take less.
_TRAINED: Final = 0.15
# Of each trained weight: what it was, what it is, its gradient, and the optimiser's two means.
_COPIES: Final = 5
# Of each that is put down: what it is, and the two means.
_KEPT: Final = 3
# States that lie there at a time: two, and the next.
_STATES: Final = 3
# Logits, their logarithms, those of the version before, and gradients of them.
_LOGITS: Final = 6
# Interpreter, torch and transformers.
_PROCESS_BYTES: Final = 700 << 20


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes."""

    worker: int
    """Of memory, of each worker."""
    disk: int
    """Where states and versions are kept."""


def needs(checkpoint: Checkpoint, rows: int, length: int, teacher_bytes: int = 0) -> Needs:
    """What training with so many rows of a step in one worker takes at most, by what is known of the model.

    `teacher_bytes`: of the files of a model that is learnt from.
    """
    count = sum(prod(entry.shape) for entry in checkpoint.tensors.values())
    experts = sum(prod(checkpoint.tensors[name].shape) for name in checkpoint.expert_tensors)
    vocabulary = int(checkpoint.text_config.get("vocab_size", 0))
    hidden = checkpoint.hidden_size * checkpoint.num_layers * 16
    trained = round(experts * _TRAINED)
    # Gradients are had of whole layers' experts before the chosen ones' are cut out.
    weights = (count + experts + trained * _COPIES) * _FLOAT
    step = rows * length * (vocabulary * _LOGITS + hidden) * _FLOAT
    # Files may be in half precision.
    taught = teacher_bytes * 2 + (rows * length * vocabulary * 2 * _FLOAT if teacher_bytes else 0)
    return Needs(_PROCESS_BYTES + weights + step + taught, trained * _FLOAT * (_KEPT * _STATES + 1))


def check_room(needed: int, free: int, what: str, way_out: str) -> None:
    """LearningError if there is too little, by how much."""
    if needed > free:
        raise LearningError(
            f"training takes about {needed / 2**30:.2f} GiB of {what}, and {free / 2**30:.2f} GiB are free: "
            f"{(needed - free) / 2**30:.2f} GiB too little",
            way_out,
        )
