"""The engine's own tensors of other versions (routers, biases, shared experts), fetched before they are needed.

Taken from the store by the router, in a thread and into memory that has no name (memfd), so that the engine, which may
only stop between two steps, reads them within milliseconds, and nothing of them is left however the router ends.
"""

from __future__ import annotations

import os

from cluster.live_versions import LiveVersions
from cluster.messages import StoreAddress
from cluster.versions.store import Store


class DenseFiles:
    """Of one replica of the router; used by one thread at a time."""

    def __init__(self, address: StoreAddress | None) -> None:
        self._address = address
        self._open: dict[str, int] = {}

    def fetch(self, versions: LiveVersions) -> None:
        """Have every live version's tensors at hand. VersionError if one is missing or damaged."""
        wanted = {blob for named in versions.dense.values() for blob in named.values()}
        for blob in self._open.keys() - wanted:
            os.close(self._open.pop(blob))
        if missing := wanted - self._open.keys():
            assert self._address is not None
            store = Store(self._address.url, self._address.options)
            for blob in missing:
                data = store.blobs.get(blob)
                descriptor = os.memfd_create("expertmesh-dense", os.MFD_CLOEXEC)
                self._open[blob] = descriptor
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(data)

    def paths(self, versions: LiveVersions, manifest: str) -> dict[str, str]:
        """Tensor → where processes of this user read it, of those that the version has of its own."""
        return {
            name: f"/proc/{os.getpid()}/fd/{self._open[blob]}"
            for name, blob in versions.dense.get(manifest, {}).items()
        }

    def close(self) -> None:
        """Give them back."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
