"""From the version that serves to another one, in one replica of the router.

Where only experts differ, the next request simply names the other version: rows of both travel together. Where the
engine's own tensors differ too, or the numbers of experts, one engine can't compute for both at once. Then requests
that run end with their version first, while new ones wait, and the tensors are changed when none is left; or, by the
operator's choice, those that run go on with the new version, which computes anew what they have said so far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from actors.dense_files import DenseFiles
from actors.pinning import Pins
from cluster.live_versions import EngineSide, LiveVersions, computed_by, engine_side

log = structlog.get_logger()


class VersionSwap:
    """Used in the router's event loop."""

    def __init__(self, pins: Pins, dense: DenseFiles, engine: Callable[[], Any]) -> None:
        self._pins, self._files, self._engine = pins, dense, engine
        self._loaded = EngineSide()
        self._draining: asyncio.Task[None] | None = None

    def can_now(self, versions: LiveVersions) -> bool:
        """Whether new requests can get what `versions` says without a word to the engine."""
        return self._continued(versions) == {} and self._wanted(versions) == self._loaded

    async def to(self, versions: LiveVersions) -> None:
        """New requests get what `versions` says, once the engine, which knows these versions, can compute it."""
        if self._draining is not None:
            self._draining.cancel()
            self._draining = None
        continued = self._continued(versions)
        same = self._wanted(versions) == self._loaded
        if continued:
            await self._go_on(versions, continued)
        elif same:
            self._pins.use(versions)
        elif self._pins.busy:
            self._pins.hold(versions)
            self._draining = asyncio.create_task(self._when_idle(versions))
        else:
            await self._change(versions)

    def _wanted(self, versions: LiveVersions) -> EngineSide:
        return engine_side(versions, computed_by(versions, self._pins.engine))

    def _continued(self, versions: LiveVersions) -> dict[str, str]:
        """Manifests whose running requests are to go on with another one, and did not before."""
        before = self._pins.versions.continued
        return {name: other for name, other in versions.continued.items() if before.get(name) != other}

    async def _go_on(self, versions: LiveVersions, continued: Mapping[str, str]) -> None:
        engine = self._engine()
        # What running requests have computed is of another version: they compute it anew.
        await engine.pause_generation(mode="keep", clear_cache=True)
        try:
            # First: what is handed to the engine from here on must name the new version, or it would come too late to
            # be told, and keep what the new one computes under the old one's name.
            self._pins.go_on(continued)
            await self._change(versions)
            await engine.collective_rpc("expertmesh_go_on_with", args=(dict(continued),))
        finally:
            await engine.resume_generation()

    async def _when_idle(self, versions: LiveVersions) -> None:
        log.info(
            "new requests wait for those of the version before", running=sum(self._pins.running.values())
        )
        await self._pins.idle()
        await self._change(versions)

    async def _change(self, versions: LiveVersions) -> None:
        wanted = self._wanted(versions)
        if wanted != self._loaded:
            files = self._files.paths(versions, computed_by(versions, self._pins.engine))
            retired = {layer: list(experts) for layer, experts in wanted.retired.items()}
            told = await self._engine().collective_rpc("expertmesh_use_dense", args=(files, retired))
            self._loaded = wanted
            log.info("the engine's own weights changed", tensors=len(wanted.dense), seconds=round(told[0], 3))
        self._pins.use(versions)
