"""Versions with other numbers of experts in a layer than the base checkpoint has.

A layer's router has a row for each of its experts, so a version with more experts has a longer router. An added expert
lives beside one of the base checkpoint's: on the same hosts, counted and moved with it. A clone is a copy of another
expert, with a copy of its row, and shares its bytes until a later version changes them. A retired expert keeps its row
and its number, so that the others keep theirs; the router is kept off it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from cluster.checkpoint import Checkpoint
from cluster.errors import VersionError
from cluster.versions.manifest import Manifest
from cluster.versions.tensors import TensorForm

_ROUTER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:[a-z0-9_]+\.)*(?:gate|router|router\.layer)\.weight")


class ExpertId(NamedTuple):
    """An expert of a layer."""

    layer: int
    expert: int

    @classmethod
    def parse(cls, text: str) -> ExpertId:
        """From LAYER:EXPERT. VersionError if it is something else."""
        layer, _, expert = text.partition(":")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise VersionError(f"{text!r} names no expert", "write it as LAYER:EXPERT, such as 3:0")
        return cls(int(layer), int(expert))


@dataclass(frozen=True, slots=True)
class Growth:
    """Which experts a version has besides the base checkpoint's, and which it does not use."""

    added: Mapping[int, Mapping[int, int]]
    """See `Manifest.added`."""
    retired: Mapping[int, tuple[int, ...]]
    copies: Mapping[ExpertId, int]
    """New expert → the one of its layer that it is a copy of."""


def routers(checkpoint: Checkpoint) -> dict[str, int]:
    """Name of a router's weights → its layer, of every layer whose router is known."""
    found = {}
    for name, entry in checkpoint.tensors.items():
        match = _ROUTER.search(name)
        layout = checkpoint.layouts.get(int(match[1])) if match else None
        if layout is not None and entry.shape == (layout.num_experts, checkpoint.hidden_size):
            found[name] = layout.layer
    return found


def sizes_of(checkpoint: Checkpoint, manifest: Manifest) -> dict[int, int]:
    """Layer index → experts of a version, those that it has retired among them: rows of its router."""
    return {
        layer: layout.num_experts + len(manifest.added.get(layer, {}))
        for layer, layout in checkpoint.layouts.items()
    }


def router_form(checkpoint: Checkpoint, name: str, experts: int) -> TensorForm:
    """What a router of so many experts is like."""
    entry = checkpoint.tensors[name]
    return TensorForm(entry.dtype, (experts, *entry.shape[1:]))


def grown(
    checkpoint: Checkpoint,
    before: Manifest,
    sizes: Mapping[int, int],
    clones: Sequence[ExpertId],
    retired: Iterable[ExpertId],
) -> Growth:
    """From the version `before`, with so many experts in each layer, the last of them these clones.

    VersionError if one that is to be cloned or retired does not exist, or too few are left to choose from.
    """
    added = {layer: dict(experts) for layer, experts in before.added.items()}
    copies = {}
    for layer, count in Counter(clone.layer for clone in clones).items():
        _check_layer(checkpoint, layer)
        first = sizes[layer] - count
        for new, origin in enumerate((c.expert for c in clones if c.layer == layer), first):
            _check_there(ExpertId(layer, origin), first, before)
            copies[ExpertId(layer, new)] = origin
    for layer, size in sizes.items():
        base = checkpoint.layouts[layer].num_experts
        of_layer = added.setdefault(layer, {})
        for expert in range(base + len(of_layer), size):
            origin = copies.get(ExpertId(layer, expert), expert % base)
            of_layer[expert] = of_layer.get(origin, origin)
    gone = {layer: list(experts) for layer, experts in before.retired.items()}
    for layer, expert in retired:
        _check_layer(checkpoint, layer)
        _check_there(ExpertId(layer, expert), sizes[layer], before)
        gone.setdefault(layer, []).append(expert)
    for layer, experts in gone.items():
        if (left := sizes[layer] - len(set(experts))) < checkpoint.top_k:
            raise VersionError(
                f"layer {layer} would have {left} experts to choose from, and its router chooses {checkpoint.top_k}",
                "retire fewer",
            )
    return Growth(
        {layer: experts for layer, experts in added.items() if experts},
        {layer: tuple(sorted(set(experts))) for layer, experts in gone.items()},
        copies,
    )


def _check_layer(checkpoint: Checkpoint, layer: int) -> None:
    if layer not in checkpoint.layouts:
        known = ", ".join(map(str, checkpoint.layouts))
        raise VersionError(
            f"layer {layer} of the base checkpoint has no experts", f"layers that have: {known}"
        )


def _check_there(which: ExpertId, size: int, before: Manifest) -> None:
    layer, expert = which
    if expert >= size:
        raise VersionError(f"layer {layer} has no expert {expert}", f"its experts are 0 to {size - 1}")
    if expert in before.retired.get(layer, ()):
        raise VersionError(
            f"expert {expert} of layer {layer} is retired already", "name another one, or another parent"
        )
