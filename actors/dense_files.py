"""The engine's own tensors of other versions (routers, biases, shared experts), fetched before they are needed.

Taken from the store by the router, in a thread and into memory-backed files, so that the engine, which may only stop
between two steps, reads them within milliseconds.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from cluster.live_versions import LiveVersions
from cluster.messages import StoreAddress
from cluster.versions.store import Store

_SHARED: Final = Path("/dev/shm")


class DenseFiles:
    """Of one replica of the router; used by one thread at a time."""

    def __init__(self, address: StoreAddress | None, parent: Path = _SHARED) -> None:
        """`parent`: where the folder for them is made, if it is there."""
        self._address, self._parent = address, parent
        self._folder: Path | None = None

    def fetch(self, versions: LiveVersions) -> None:
        """Have every live version's tensors at hand. VersionError if one is missing or damaged."""
        wanted = {blob for named in versions.dense.values() for blob in named.values()}
        if self._folder is None:
            if not wanted:
                return
            parent = self._parent if self._parent.is_dir() else None
            self._folder = Path(tempfile.mkdtemp(prefix="expertmesh-dense-", dir=parent))
        there = {path.name for path in self._folder.iterdir()}
        for blob in there - wanted:
            (self._folder / blob).unlink()
        if missing := wanted - there:
            assert self._address is not None
            store = Store(self._address.url, self._address.options)
            for blob in missing:
                fresh = self._folder / f".{blob}"
                fresh.write_bytes(store.blobs.get(blob))
                fresh.rename(self._folder / blob)

    def paths(self, versions: LiveVersions, manifest: str) -> dict[str, str]:
        """Tensor → the file that has it, of those that the version has of its own."""
        return {
            name: str(self._folder / blob)
            for name, blob in versions.dense.get(manifest, {}).items()
            if self._folder is not None
        }

    def close(self) -> None:
        """Remove them."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
