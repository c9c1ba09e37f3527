"""Reads the experts that are not the base checkpoint's: blobs of the store of versions, each with its digest proved.

A host that can't read the store, such as a folder of another node, copies them from hosts that can.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Final

import structlog
from safetensors import SafetensorError, safe_open

from actors.blob import LARGEST_ITEM, is_whole
from actors.peer_copy import PeerCopy
from actors.stored_expert import CopiedCheckpoint, StoredExpert
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError, ExpertmeshError, HostError, VersionError
from cluster.live_versions import Variant, Variants
from cluster.messages import HostSpec
from cluster.versions.expert_blob import check_expert, expert_form
from cluster.versions.store import Store

log = structlog.get_logger()

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
# Names, dtypes and shapes of at most eight tensors, and a line of metadata.
_MOST_HEADER_BYTES: Final = 4096
_PUBLISH: Final = "publish the version again"


class VariantReader:
    """Of one host; `know`, `give` and reading may be in different threads."""

    def __init__(self, spec: HostSpec) -> None:
        self._address = spec.store
        self._change = threading.Lock()
        self._known: dict[tuple[int, int], Variant] = {}
        self._store: Store | None = None
        self._copy: PeerCopy | None = None
        self._hosts_first = False
        self.know(spec.variants)

    def know(self, variants: Variants) -> None:
        """Numbers and what they are; a number is never another content's."""
        with self._change:
            self._known.update(
                ((layer, number), variant)
                for layer, named in variants.items()
                for number, variant in named.items()
            )

    @contextmanager
    def copying(self, copy: PeerCopy | None) -> Iterator[None]:
        """For as long as the block lasts other hosts are asked for what the store does not give."""
        self._copy, self._hosts_first = copy, False
        try:
            if copy is None:
                yield
            else:
                with closing(copy):
                    yield
        finally:
            self._copy = None

    def give(self, blob: str) -> bytes:
        """A blob for another host, from the store alone. HostError or VersionError if it can't be had there."""
        if not _DIGEST.fullmatch(blob):
            raise HostError(f"{blob[:80]!r} is no blob's digest")
        return self._from_store(blob)

    def __call__(self, checkpoint: Checkpoint, layer: int, number: int) -> StoredExpert:
        """The expert of this number, as `checkpoint` stores its own.

        CheckpointError if it can't be had, or is not like those of its layer.
        """
        with self._change:
            variant = self._known.get((layer, number))
        if variant is None or self._address is None:
            raise CheckpointError(f"layer {layer} has no expert {number}")
        name = f"expert {variant.expert} of layer {layer} (blob {variant.blob[:12]})"
        most = checkpoint.layout(layer).expert_parameters * LARGEST_ITEM + _MOST_HEADER_BYTES
        data = self._had(variant.blob, most, name)
        if isinstance(checkpoint, CopiedCheckpoint):
            found = stored(data, name)
            _check_like(found, checkpoint, layer, name)
            return found
        try:
            check_expert(data, expert_form(checkpoint, layer), name)
        except VersionError as error:
            raise CheckpointError(error.message, error.hint) from error
        return stored(data, name)

    def _had(self, blob: str, most: int, name: str) -> bytes:
        """From the store, else from other hosts; from them first where the store has failed just now."""

        def from_hosts() -> bytes:
            if self._copy is None:
                raise HostError("no other host can be asked")
            return self._copy.version(blob, most)

        ways: list[Callable[[], bytes]] = [lambda: self._from_store(blob), from_hosts]
        reasons: list[ExpertmeshError] = []
        for way in reversed(ways) if self._hosts_first else ways:
            try:
                data = way()
            except ExpertmeshError as error:
                reasons.append(error)
                continue
            if way is from_hosts and not self._hosts_first:
                # A server that is out of reach takes its time to say so, which need not be waited for again.
                self._hosts_first = True
                log.warning("versions are copied from other hosts", reason=reasons[0].message)
            return data
        told = ", and ".join(error.message for error in (reasons[::-1] if self._hosts_first else reasons))
        raise CheckpointError(
            f"{name}: {told}",
            "let this node reach versions.store, or start a host on a node that does",
        ) from reasons[0]

    def _from_store(self, blob: str) -> bytes:
        if self._address is None:
            raise HostError("has no store of versions")
        self._store = self._store or Store(self._address.url, self._address.options)
        return self._store.blobs.get(blob)


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
        raise CheckpointError(f"{name} is no safetensors file: {error}", _PUBLISH) from error
    finally:
        os.close(fd)
    return StoredExpert(parts, fused, lambda part: f"{name}, {part}")


def _check_like(found: StoredExpert, checkpoint: CopiedCheckpoint, layer: int, name: str) -> None:
    """What can be told where the layer's headers are not at hand; shapes are compared with config.json behind it."""
    told = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in found.parts.items())
    parameters = checkpoint.layout(layer).expert_parameters
    if not is_whole(found.parts, parameters):
        raise CheckpointError(f"{name} is no expert of {parameters} parameters: {told}", _PUBLISH)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in found.parts.values()}
    if strange := dtypes - checkpoint.stored_dtypes(layer):
        raise CheckpointError(
            f"{name} is {', '.join(sorted(strange))}, the base checkpoint has "
            f"{', '.join(sorted(checkpoint.stored_dtypes(layer)))} there",
            _PUBLISH,
        )
