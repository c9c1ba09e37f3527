"""What a blob is: one expert, or one tensor of the engine's, as the base checkpoint stores it.

An expert's tensors are named by canonical part, see `cluster.expert_names`. Its header says whether they were cut out
of one tensor of all experts, and so may lie transposed, as the base checkpoint's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cluster.checkpoint import Checkpoint
from cluster.errors import VersionError
from cluster.expert_names import is_prediction_head
from cluster.versions.tensors import ITEM_BYTES, TensorForm, check, decode, encode

_FUSED: Final = "fused"


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """What every expert of a layer is like in the base checkpoint, and so in every blob."""

    parts: Mapping[str, TensorForm]
    """By canonical part, of one expert."""
    fused: bool
    """Whether they are cut out of one tensor of all experts."""

    @property
    def size(self) -> int:
        """Bytes of one expert's tensors."""
        return sum(form.size for form in self.parts.values())


def expert_form(checkpoint: Checkpoint, layer: int) -> ExpertForm:
    """From the checkpoint's headers. CheckpointError if the layer has no experts."""
    layout = checkpoint.layout(layer)
    entries = {part: checkpoint.tensors[names[0]] for part, names in layout.parts.items()}
    return ExpertForm(
        {
            part: TensorForm(entry.dtype, entry.shape[1:] if layout.fused else entry.shape)
            for part, entry in entries.items()
        },
        layout.fused,
    )


def encode_expert(form: ExpertForm, parts: Mapping[str, bytes]) -> bytes:
    """The blob of an expert with these bytes of its parts, in row-major order."""
    return encode(form.parts, parts, {_FUSED: str(form.fused)})


def check_expert(data: bytes, form: ExpertForm, what: str) -> dict[str, memoryview]:
    """The parts' bytes, views of `data`; `what` names the blob in errors.

    VersionError, with what is wrong, if it is no safetensors file, torn, or not of this form.
    """
    found = decode(data, what)
    check(found, form.parts, what)
    if found.metadata.get(_FUSED) != str(form.fused):
        raise VersionError(
            f"{what}: its header says fused: {found.metadata.get(_FUSED)}, it should be {form.fused}",
            "publish the version again that it is of",
        )
    return dict(found.data)


def dense_form(checkpoint: Checkpoint, name: str) -> TensorForm:
    """Of a tensor of the engine's: a router's, a bias, a shared expert's. VersionError if it is none."""
    entry = checkpoint.tensors.get(name)
    if entry is None:
        raise VersionError(
            f"the base checkpoint has no tensor {name}", "name tensors as the base checkpoint does"
        )
    if checkpoint.is_expert_tensor(name):
        raise VersionError(f"{name} belongs to experts", "publish it as theirs, not as the engine's")
    if is_prediction_head(name, checkpoint.num_layers):
        raise VersionError(
            f"{name} is of a layer that predicts further tokens, which nobody loads", "leave it out"
        )
    if entry.dtype not in ITEM_BYTES:
        raise VersionError(f"{name} is stored as {entry.dtype}, which can't be published", "leave it out")
    return TensorForm(entry.dtype, entry.shape)


def encode_dense(name: str, form: TensorForm, data: bytes) -> bytes:
    """The blob of a tensor with these bytes, in row-major order, under its name in the checkpoint."""
    return encode({name: form}, {name: data}, {})


def check_dense(data: bytes, name: str, form: TensorForm, what: str) -> memoryview:
    """The tensor's bytes, a view of `data`; VersionError as from `check_expert`."""
    found = decode(data, what)
    check(found, {name: form}, what)
    return found.data[name]
