"""What is to be published: from the headers of safetensors files to experts and tensors, each with its bytes' place.

Only headers are read. All that can be wrong with names, shapes and dtypes is found here, before anything is written.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from cluster.checkpoint import Checkpoint
from cluster.errors import VersionError
from cluster.expert_names import ExpertTensor, canonical_part, is_prediction_head, parse_expert_name
from cluster.safetensors_headers import TensorEntry, read_header, read_headers
from cluster.versions.expert_blob import ExpertForm, dense_form, expert_form
from cluster.versions.growth import router_form, routers
from cluster.versions.spans import Span
from cluster.versions.tensors import TensorForm

_AS_STORED: Final = "save it with the shape and the dtype that the base checkpoint stores"


@dataclass(frozen=True, slots=True)
class Source:
    """What the files name; experts are whole."""

    experts: Mapping[tuple[int, int], Mapping[str, Span]]
    """(Layer, expert) → canonical part → its bytes."""
    dense: Mapping[str, Span]
    """Name of a tensor of the engine's → its bytes."""
    sizes: Mapping[int, int]
    """Layer index → experts of the version: rows of its router."""


def base_expert(checkpoint: Checkpoint, layer: int, expert: int) -> dict[str, Span]:
    """Canonical part → where the base checkpoint has its bytes."""
    layout, found = checkpoint.layout(layer), {}
    for part in layout.parts:
        entry = checkpoint.tensors[layout.tensor_name(part, expert)]
        if layout.fused:
            found[part] = _slice(checkpoint.path, entry, expert, layout.num_experts)
        else:
            found[part] = _span(checkpoint.path / entry.file, entry)
    return found


def base_dense(checkpoint: Checkpoint, name: str) -> Span:
    """Where the base checkpoint has a tensor of the engine's."""
    entry = checkpoint.tensors[name]
    return _span(checkpoint.path / entry.file, entry)


def open_source(path: Path, checkpoint: Checkpoint, sizes: Mapping[int, int]) -> Source:
    """What `path` is to change of a version of the base `checkpoint` that has so many experts in its layers.

    It is a checkpoint's folder, or a file or a folder of files with some tensors; a router of it with more rows makes
    its layer larger. Raises CheckpointError for files that are torn, and VersionError, with the tensor's name, for one
    that the base checkpoint does not have in this way and for an expert that is not whole.
    """
    whole = (path / "config.json").exists()
    tensors = _checkpoint_tensors(path, checkpoint) if whole else _loose_tensors(path)
    if not tensors:
        raise VersionError(f"{path} holds no tensors", "give the experts and tensors that are to change")
    experts: dict[tuple[int, int], dict[str, Span]] = defaultdict(dict)
    dense: dict[str, Span] = {}
    forms = {layer: expert_form(checkpoint, layer) for layer in checkpoint.layouts}
    of_routers = {name: layer for name, layer in routers(checkpoint).items() if name in tensors}
    sizes = {**sizes, **{layer: _rows(tensors[name], sizes[layer]) for name, layer in of_routers.items()}}
    for name, found in tensors.items():
        if whole and is_prediction_head(name, checkpoint.num_layers):
            continue
        parsed = parse_expert_name(name, checkpoint.num_layers)
        if parsed is None:
            form = dense_form(checkpoint, name)
            if name in of_routers:
                form = router_form(checkpoint, name, sizes[of_routers[name]])
            found.check(name, form)
            dense[name] = found.span
            continue
        part = _known_part(name, parsed, checkpoint, forms, sizes)
        for expert, span in _of_experts(name, parsed, found, part, forms[parsed.layer], sizes[parsed.layer]):
            if part in experts[parsed.layer, expert]:
                raise VersionError(
                    f"{path}: {part} of expert {expert} of layer {parsed.layer} is there twice, once as {name}",
                    "leave one of the two out",
                )
            experts[parsed.layer, expert][part] = span
    for (layer, expert), parts in experts.items():
        if missing := forms[layer].parts.keys() - parts.keys():
            raise VersionError(
                f"{path}: {', '.join(sorted(missing))} of expert {expert} of layer {layer} is missing "
                f"(there: {', '.join(sorted(parts))})",
                "all parts of an expert come together: add those that did not change as well",
            )
    if whole:
        _check_complete(path, sizes, experts)
    return Source(dict(experts), dense, sizes)


def _rows(router: _Found, least: int) -> int:
    """Of a router that is to have so many rows at least, which its form is checked for later."""
    return max(least, router.entry.shape[0]) if router.entry.shape else least


def _check_complete(path: Path, sizes: Mapping[int, int], experts: Collection[tuple[int, int]]) -> None:
    """VersionError if a checkpoint lacks an expert: what is not named would silently be the parent's."""
    for layer, size in sizes.items():
        for expert in range(size):
            if (layer, expert) not in experts:
                raise VersionError(
                    f"{path} is a checkpoint without expert {expert} of layer {layer}",
                    "fetch all of it, or take config.json away if it is to hold changes alone",
                )


class _Found(NamedTuple):
    """A tensor of the source."""

    file: Path
    entry: TensorEntry

    @property
    def span(self) -> Span:
        return _span(self.file, self.entry)

    def check(self, name: str, form: TensorForm) -> None:
        """VersionError if it is not of this form."""
        mine = TensorForm(self.entry.dtype, self.entry.shape)
        if mine != form:
            raise VersionError(f"{self.file}: {name} is {mine}, expected is {form}", _AS_STORED)
        if self.span.size != form.size:
            raise VersionError(f"{self.file}: {name} has {self.span.size} bytes, {form} has {form.size}")


def _known_part(
    name: str,
    parsed: ExpertTensor,
    checkpoint: Checkpoint,
    forms: Mapping[int, ExpertForm],
    sizes: Mapping[int, int],
) -> str:
    """The canonical part; VersionError if there is no such layer or part in the base checkpoint, or no such expert."""
    if parsed.layer not in forms:
        known = ", ".join(map(str, forms))
        raise VersionError(
            f"{name}: layer {parsed.layer} of the base checkpoint has no experts",
            f"layers that have: {known}",
        )
    form, num = forms[parsed.layer], sizes[parsed.layer]
    if parsed.expert is not None and parsed.expert >= num:
        raise VersionError(
            f"{name}: layer {parsed.layer} has no expert {parsed.expert}",
            f"its experts are 0 to {num - 1}; with more of them it takes a router with as many rows",
        )
    part = canonical_part(parsed.part)
    if part is None or part not in form.parts:
        raise VersionError(
            f"{name} is no part of an expert of the base checkpoint",
            f"one of layer {parsed.layer} is made of {', '.join(sorted(form.parts))}",
        )
    return part


def _of_experts(
    name: str, parsed: ExpertTensor, found: _Found, part: str, form: ExpertForm, num: int
) -> Iterator[tuple[int, Span]]:
    """The expert that the tensor belongs to with its bytes, or all experts if it holds all."""
    wanted = form.parts[part]
    if parsed.expert is not None:
        found.check(name, wanted)
        yield parsed.expert, found.span
        return
    if not form.fused:
        raise VersionError(
            f"{name} holds all experts of layer {parsed.layer}, the base checkpoint has a tensor for each",
            "name them one by one, as the base checkpoint does",
        )
    found.check(name, TensorForm(wanted.dtype, (num, *wanted.shape)))
    for expert in range(num):
        yield expert, _slice(found.file.parent, found.entry, expert, num)


def _checkpoint_tensors(path: Path, checkpoint: Checkpoint) -> dict[str, _Found]:
    try:
        config = json.loads((path / "config.json").read_bytes())
        kind = str(config.get("model_type", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise VersionError(f"{path / 'config.json'} can't be read: {error}", "save it again") from error
    if kind != checkpoint.model_type:
        raise VersionError(
            f"{path} is a model of type {kind}, the base checkpoint is of type {checkpoint.model_type}",
            "give a checkpoint that was made from the base",
        )
    tensors, _ = read_headers(path)
    return {name: _Found(path / entry.file, entry) for name, entry in tensors.items()}


def _loose_tensors(path: Path) -> dict[str, _Found]:
    if not path.exists():
        raise VersionError(
            f"no such file or folder: {path}", "give a *.safetensors file, or a folder with some"
        )
    tensors: dict[str, _Found] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise VersionError(
                    f"{name} is in {tensors[name].file} and in {file}", "leave one of them out"
                )
            tensors[name] = _Found(file, entry)
    return tensors


def _span(file: Path, entry: TensorEntry) -> Span:
    return Span(file, entry.start, entry.end - entry.start)


def _slice(folder: Path, entry: TensorEntry, expert: int, num: int) -> Span:
    size = (entry.end - entry.start) // num
    return Span(folder / entry.file, entry.start + expert * size, size)
