"""The store of a model's versions, opened: its blobs, manifests, aliases and signatures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.versions.aliases import Aliases
from cluster.versions.blobs import Blobs
from cluster.versions.files import Files
from cluster.versions.manifest import Manifest, Manifests


class Store:
    """Everything under one URL. It belongs to one model: aliases say nothing of which."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """`options` are fsspec's for this kind of URL. VersionError if it can't be opened."""
        self.files = Files(url, **(options or {}))
        self.blobs = Blobs(self.files)
        self.manifests = Manifests(self.files)
        self.aliases = Aliases(self.files)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.files.url

    def find(self, text: str) -> str:
        """The digest of the version that an alias of this name points to, or whose digest begins so.

        VersionError if there is none, or several digests begin so.
        """
        if text in self.aliases.names():
            move = self.aliases.current(text)
            assert move is not None
            return move.manifest
        return self.manifests.find(text)

    def missing(self, manifest: Manifest) -> tuple[str, ...]:
        """Digests of the blobs that the version needs and that are not there; what is in them is not looked at."""
        return tuple(sorted(manifest.blobs - self.blobs.all())) if manifest.blobs else ()
