"""A manifest: one whole version of a model, as names of blobs. Immutable, and named by the sha256 of its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from pydantic import TypeAdapter, ValidationError

from cluster.errors import VersionError
from cluster.versions.files import Files

_FOLDER = "manifests"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version."""

    model: str
    """Digest of the base checkpoint's architecture, see `cluster.checkpoint`."""
    experts: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    """Layer index → expert → digest of its blob; experts that are not named are the base checkpoint's, which nobody
    copies.
    """
    dense: Mapping[str, str] = field(default_factory=dict)
    """Name of a tensor of the engine's (router, bias, shared expert) → digest of its blob; only those that differ from
    the base checkpoint's.
    """
    parent: str = ""
    """Digest of the manifest that it was made from; "" for the first."""
    author: str = ""
    reason: str = ""
    created: float = 0.0
    """Seconds since 1970."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the gate measured."""

    def to_json(self) -> bytes:
        """The same bytes for the same version, on any machine."""
        tree = _MANIFEST.dump_python(self, mode="json")
        return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """Its name."""
        return sha256(self.to_json()).hexdigest()

    @property
    def blobs(self) -> frozenset[str]:
        """Digests of everything that it is made of."""
        return frozenset(digest for named in self.experts.values() for digest in named.values()) | {
            *self.dense.values()
        }

    def changed(self, parent: Manifest) -> dict[int, tuple[int, ...]]:
        """Layer index → experts that are not the other's, one of the two may have the base's; no layer without one."""
        found = {}
        for layer in sorted({*self.experts, *parent.experts}):
            mine, theirs = self.experts.get(layer, {}), parent.experts.get(layer, {})
            if experts := sorted(e for e in {*mine, *theirs} if mine.get(e) != theirs.get(e)):
                found[layer] = tuple(experts)
        return found


_MANIFEST: Final = TypeAdapter(Manifest)


class Manifests:
    """The manifests of a store."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def put(self, manifest: Manifest) -> str:
        """Keep it; its digest. The blobs must be there before, or readers may find it without them."""
        digest = manifest.digest
        self._files.create(f"{_FOLDER}/{digest}", manifest.to_json())
        return digest

    def get(self, digest: str) -> Manifest:
        """VersionError if there is none, or it is damaged."""
        data = self._files.read(f"{_FOLDER}/{digest}")
        way_out = "take another version: `expertmesh versions list`"
        if sha256(data).hexdigest() != digest:
            raise VersionError(f"manifest {digest[:12]} of {self._files.url} is damaged", way_out)
        try:
            return _MANIFEST.validate_json(data)
        except ValidationError as error:
            said = str(error).splitlines()[0]
            raise VersionError(f"manifest {digest[:12]} makes no sense: {said}", way_out) from error

    def find(self, text: str) -> str:
        """The digest that begins so. VersionError if none does, or several do."""
        found = [digest for digest in self.all() if digest.startswith(text)]
        if len(found) == 1:
            return found[0]
        what = "several versions begin" if found else "no version begins"
        raise VersionError(f"{what} with {text!r}", "see `expertmesh versions list`")

    def all(self) -> list[str]:
        """Digests of all manifests."""
        names = (name.rpartition("/")[2] for name in self._files.names(_FOLDER))
        return [name for name in names if _DIGEST.fullmatch(name)]

    def remove(self, digest: str) -> int:
        """Take it away; the bytes that it had."""
        return self._files.remove(f"{_FOLDER}/{digest}")
