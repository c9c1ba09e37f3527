"""A version as a transformers model, to be trained and judged: the same tensors that serve, by the same names.

Shape suffixes: E = experts, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

from actors.dense_weights import more_rows
from actors.expert_slices import DOWN, GATE_UP
from actors.text_routing import expert_modules, router_modules
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from cluster.versions.expert_blob import check_dense, check_expert, dense_form, expert_form
from cluster.versions.growth import router_form, routers, sizes_of
from cluster.versions.manifest import Manifest
from cluster.versions.store import Store

Encode = Callable[[str], list[int]]


def open_version(
    checkpoint: Checkpoint,
    store: Store | None = None,
    digest: str = "",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """The model of a version ("": of the base checkpoint).

    LearningError for a version of another model, or with experts that were retired. VersionError if it can't be read.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils import logging

    # Progress is shown by ours.
    logging.disable_progress_bar()
    manifest = store.manifests.get(digest) if store is not None and digest else Manifest(checkpoint.digest)
    _check(checkpoint, manifest, digest)
    own = _Own({}, {}) if store is None else _own(checkpoint, manifest, store)
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    # A dictionary of tensors is converted as those of a folder would be.
    of_kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = of_kind.from_pretrained(None, config=config, state_dict=_tensors(checkpoint, own), dtype=dtype)
    rows = more_rows(checkpoint, own.dense)
    for layer, added in sorted(manifest.added.items()):
        for row_H, (expert, home) in zip(rows[layer], sorted(added.items()), strict=True):
            add_expert(model, layer, row_H, _matrices(checkpoint, layer, expert, home, own))
    return model.to(device).eval()


def open_encoder(checkpoint: Checkpoint) -> Encode:
    """What makes token numbers of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    return lambda text: list(tokenizer(text)["input_ids"])


def add_expert(model: nn.Module, layer: int, row_H: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> int:
    """Have a layer's experts be one more, with this row of the router and these tensors; its number."""
    experts, router = expert_modules(model)[layer], router_modules(model)[layer]
    number = int(experts.num_experts)
    for name, tensor in tensors.items():
        held = getattr(experts, name)
        longer = torch.cat((held.data, tensor.to(held.data)[None]))
        setattr(experts, name, nn.Parameter(longer, requires_grad=False))
    weight_EH = torch.cat((router.weight.data, row_H.to(router.weight.data)[None]))
    router.weight = nn.Parameter(weight_EH, requires_grad=False)
    for module in (experts, router):
        for name in ("num_experts", "n_routed_experts", "num_local_experts"):
            if hasattr(module, name):
                setattr(module, name, number + 1)
    return number


def _check(checkpoint: Checkpoint, manifest: Manifest, digest: str) -> None:
    if manifest.model != checkpoint.digest:
        raise LearningError(
            f"version {digest[:12]} is of another model than {checkpoint.path}",
            "learn with the checkpoint that it was made from",
        )
    if manifest.retired:
        raise LearningError(
            f"version {digest[:12]} has experts that were retired, which training can't leave out yet",
            "learn from a version before them",
        )


@dataclass(frozen=True, slots=True)
class _Own:
    """What a version has that is not the base checkpoint's."""

    experts: Mapping[tuple[int, int], Mapping[str, torch.Tensor]]
    """(Layer, expert) → canonical part → its tensor."""
    dense: Mapping[str, torch.Tensor]
    """By the checkpoint's names."""


def _own(checkpoint: Checkpoint, manifest: Manifest, store: Store) -> _Own:
    experts: dict[tuple[int, int], Mapping[str, torch.Tensor]] = {}
    for layer, named in manifest.experts.items():
        form = expert_form(checkpoint, layer)
        for expert, blob in named.items():
            data = store.blobs.get(blob)
            check_expert(data, form, f"expert {expert} of layer {layer}")
            experts[layer, expert] = load(data)
    sizes, of_layer = sizes_of(checkpoint, manifest), routers(checkpoint)
    dense: dict[str, torch.Tensor] = {}
    for name, blob in manifest.dense.items():
        data, grown = store.blobs.get(blob), of_layer.get(name)
        form_of = (
            dense_form(checkpoint, name) if grown is None else router_form(checkpoint, name, sizes[grown])
        )
        check_dense(data, name, form_of, name)
        dense[name] = load(data)[name]
    return _Own(experts, dense)


def _tensors(checkpoint: Checkpoint, own: _Own) -> dict[str, torch.Tensor]:
    """By the checkpoint's names, all that the checkpoint has a place for."""
    by_file: dict[str, list[str]] = {}
    for name, entry in checkpoint.tensors.items():
        by_file.setdefault(entry.file, []).append(name)
    found: dict[str, torch.Tensor] = {}
    for file, names in by_file.items():
        with safe_open(checkpoint.path / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in names}
    for name, tensor in own.dense.items():
        # Of a longer router as many rows as the checkpoint's has.
        found[name] = tensor[: len(found[name])] if tensor.ndim else tensor
    for (layer, expert), parts in own.experts.items():
        layout = checkpoint.layout(layer)
        if expert >= layout.num_experts:
            continue
        for part, tensor in parts.items():
            name = layout.tensor_name(part, expert)
            if layout.fused:
                found[name] = found[name].clone()
                found[name][expert] = tensor
            else:
                found[name] = tensor
    return found


def _matrices(
    checkpoint: Checkpoint, layer: int, expert: int, home: int, own: _Own
) -> dict[str, torch.Tensor]:
    """An added expert's tensors as transformers keeps them; `home`: the one of the base whose content it has else."""
    layout = checkpoint.layout(layer)
    if layout.fused or set(layout.parts) != {"gate", "up", "down"}:
        raise LearningError(
            f"{checkpoint.path} keeps experts in a layout of which added ones can't be read yet",
            "learn from a version without added experts",
        )
    parts = own.experts.get((layer, expert))
    if parts is None:
        parts = {part: _of_base(checkpoint, layout.tensor_name(part, home)) for part in layout.parts}
    return {GATE_UP: torch.cat((parts["gate"], parts["up"])), DOWN: parts["down"]}


def _of_base(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.path / checkpoint.tensors[name].file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor
