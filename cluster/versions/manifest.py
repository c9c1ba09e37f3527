"""A manifest: one whole version of a model, as names of blobs. Immutable, and named by the sha256 of its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from pydantic import TypeAdapter, ValidationError

from cluster.errors import UnknownVersionError, VersionError
from cluster.versions.files import Files

_FOLDER = "manifests"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_WAY_OUT: Final = "take another version: `expertmesh versions list`"


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
    added: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    """Layer index → expert that the base checkpoint does not have → the one of the base beside which it lives, and
    whose content it has where `experts` names none. Its rows of the router are in `dense`.
    """
    retired: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Layer index → experts that the router does not choose any more."""

    def to_json(self) -> bytes:
        """The same bytes for the same version, on any machine."""
        tree = _MANIFEST.dump_python(self, mode="json")
        # Versions without them have the names that they had before there were such.
        tree = {key: value for key, value in tree.items() if value or key not in ("added", "retired")}
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

    def named(self) -> Iterator[tuple[str, str]]:
        """What each of its blobs is, in words, and the blob's digest."""
        for layer, experts in sorted(self.experts.items()):
            for expert, digest in sorted(experts.items()):
                yield f"layer {layer}, expert {expert}", digest
        yield from sorted(self.dense.items())

    def changed(self, parent: Manifest) -> dict[int, tuple[int, ...]]:
        """Layer index → experts that are not the other's, one of the two may have the base's; no layer without one."""
        found: dict[int, tuple[int, ...]] = {}
        mine, theirs = self._contents(), parent._contents()
        for layer, expert in sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)):
            found[layer] = (*found.get(layer, ()), expert)
        return found

    def _contents(self) -> dict[tuple[int, int], object]:
        """(Layer, expert) → something that is equal for the same content, of all that are not the base's."""
        found: dict[tuple[int, int], object] = {}
        for layer, added in self.added.items():
            found |= {(layer, expert): home for expert, home in added.items()}
        for layer, experts in self.experts.items():
            found |= {(layer, expert): digest for expert, digest in experts.items()}
        return found | {(layer, expert): "retired" for layer, gone in self.retired.items() for expert in gone}


_MANIFEST: Final = TypeAdapter(Manifest)


class Manifests:
    """The manifests of a store."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def put(self, manifest: Manifest) -> str:
        """Keep it; its digest. The blobs must be there before, or readers may find it without them."""
        digest, data = manifest.digest, manifest.to_json()
        if not self._files.create(f"{_FOLDER}/{digest}", data):
            # It may be damaged.
            self._files.renew(f"{_FOLDER}/{digest}", data)
        return digest

    def get(self, digest: str) -> Manifest:
        """VersionError if there is none, or it is damaged."""
        try:
            return _MANIFEST.validate_json(self.read(digest))
        except ValidationError as error:
            said = str(error).splitlines()[0]
            raise VersionError(f"manifest {digest[:12]} makes no sense: {said}", _WAY_OUT) from error

    def read(self, digest: str) -> bytes:
        """Its JSON. VersionError if there is none, or it is damaged."""
        data = self._files.read(f"{_FOLDER}/{digest}")
        if sha256(data).hexdigest() != digest:
            raise VersionError(f"manifest {digest[:12]} of {self._files.url} is damaged", _WAY_OUT)
        return data

    def renew(self, digest: str) -> None:
        """Have it count as published just now, so that it is no garbage for a while. VersionError as from `read`."""
        self._files.renew(f"{_FOLDER}/{digest}", self.read(digest))

    def find(self, text: str) -> str:
        """The digest that begins so. VersionError if none does, or several do."""
        found = [digest for digest in self.all() if digest.startswith(text)]
        if len(found) == 1:
            return found[0]
        see = "see `expertmesh versions list`"
        if not found:
            raise UnknownVersionError(f"no version begins with {text!r}", see)
        raise VersionError(f"several versions begin with {text!r}", see)

    def all(self) -> list[str]:
        """Digests of all manifests."""
        names = (name.rpartition("/")[2] for name in self._files.names(_FOLDER))
        return [name for name in names if _DIGEST.fullmatch(name)]

    def modified(self, digest: str) -> float | None:
        """See `Files.modified`."""
        return self._files.modified(f"{_FOLDER}/{digest}")

    def size(self, digest: str) -> int:
        """Bytes of the manifest itself; 0 if there is none."""
        return self._files.size(f"{_FOLDER}/{digest}")

    def remove(self, digest: str) -> int:
        """Take it away; the bytes that it had."""
        return self._files.remove(f"{_FOLDER}/{digest}")
