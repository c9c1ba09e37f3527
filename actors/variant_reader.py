"""Reads the experts that are not the base checkpoint's: blobs of the store of versions, each with its digest proved."""

from __future__ import annotations

import os
import threading

from safetensors import SafetensorError, safe_open

from actors.stored_expert import StoredExpert
from cluster.errors import CheckpointError, ExpertmeshError
from cluster.live_versions import Variant, Variants
from cluster.messages import HostSpec
from cluster.versions.store import Store


class VariantReader:
    """Of one host; `know` and reading may be in different threads."""

    def __init__(self, spec: HostSpec) -> None:
        self._address = spec.store
        self._change = threading.Lock()
        self._known: dict[tuple[int, int], Variant] = {}
        self._store: Store | None = None
        self.know(spec.variants)

    def know(self, variants: Variants) -> None:
        """Numbers and what they are; a number is never another content's."""
        with self._change:
            self._known.update(
                ((layer, number), variant)
                for layer, named in variants.items()
                for number, variant in named.items()
            )

    def __call__(self, layer: int, number: int) -> StoredExpert:
        """The expert of this number. CheckpointError if it can't be had, or is not what it should be."""
        with self._change:
            variant = self._known.get((layer, number))
        if variant is None or self._address is None:
            raise CheckpointError(f"layer {layer} has no expert {number}")
        name = f"expert {variant.expert} of layer {layer} (blob {variant.blob[:12]})"
        try:
            self._store = self._store or Store(self._address.url, self._address.options)
            return stored(self._store.blobs.get(variant.blob), name)
        except ExpertmeshError as error:
            raise CheckpointError(f"{name}: {error.message}", error.hint) from error


def stored(data: bytes, name: str) -> StoredExpert:
    """A blob's tensors; `name` names it in errors. CheckpointError if it is no safetensors file."""
    fd = os.memfd_create("expertmesh-blob", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        with safe_open(f"/proc/self/fd/{fd}", framework="pt") as tensors:
            fused = (tensors.metadata() or {}).get("fused") == "True"
            parts = {part: tensors.get_tensor(part) for part in tensors.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} is no safetensors file: {error}", "publish the version again"
        ) from error
    finally:
        os.close(fd)
    return StoredExpert(parts, fused, lambda part: f"{name}, {part}")
