"""Hosts, a store of versions and an engine that follows, in memory."""

from __future__ import annotations

import uuid
from dataclasses import replace

from cluster.controller import Controller
from cluster.deployment import Deployment
from cluster.live_versions import LiveVersions
from cluster.messages import MoeLayer, StoreAddress
from cluster.promotion import VersionSettings
from cluster.table import PlacementTable
from cluster.versions.aliases import Move
from cluster.versions.manifest import Manifest
from cluster.versions.store import Store
from tests.unit.cluster.test_controller import EXPERTS, MODEL, MemoryWorld

KEEP_S = 100.0
BASE = Manifest(MODEL)


class Crash(BaseException):
    """The controller's process ends here."""


class VersionWorld(MemoryWorld):
    """With a store, and an engine that follows the table."""

    def __init__(self) -> None:
        super().__init__()
        self.address = StoreAddress(f"memory://{uuid.uuid4().hex}")
        self.store = Store(self.address.url)
        self.store.manifests.put(BASE)
        self.store.aliases.move("production", Move(1, BASE.digest, 0.0))
        self.table: PlacementTable | None = None
        self.running: set[str] = set()

    def controller(self) -> Controller:
        controller = super().controller()
        controller.versions._wall = controller.trials._wall = lambda: self.now
        return controller

    def deployment(self, name: str = "model") -> Deployment:
        planned = super().deployment(name)
        table = PlacementTable.from_json(planned.table)
        versions = LiveVersions(BASE.digest, {BASE.digest: {}})
        return replace(
            planned,
            hosts=tuple(replace(s, group=s.host_id[0], store=self.address) for s in planned.hosts),
            table=replace(table, versions=versions).to_json(),
            layers=tuple(MoeLayer(layer, 6, 100) for layer in EXPERTS),
            store=self.address,
            version_settings=VersionSettings(keep_warm_s=KEEP_S, spare_experts=2),
        )

    def publish(
        self,
        experts: dict[int, str],
        parent: str = "",
        added: dict[int, int] | None = None,
        retired: tuple[int, ...] = (),
    ) -> str:
        """A version with these contents of experts of layer 2; with others beside some, or without some, it has a
        router of its own.
        """
        named = {expert: self.store.blobs.put(text.encode())[0] for expert, text in experts.items()}
        grown = bool(added or retired)
        return self.store.manifests.put(
            Manifest(
                MODEL,
                {2: named} if named else {},
                {"gate": self.store.blobs.put(f"{added} {retired}".encode())[0]} if grown else {},
                parent,
                added={2: added} if added else {},
                retired={2: retired} if retired else {},
            )
        )

    def follow(self, controller: Controller) -> None:
        """The engine takes the table, and says so."""
        epoch = self.table.epoch if self.table is not None else -1
        text = controller.next_table(epoch, 0, "engine", sorted(self.running))
        if text:
            self.table = PlacementTable.from_json(text)
            controller.next_table(self.table.epoch, 0, "engine", sorted(self.running))


def live(controller: Controller) -> LiveVersions:
    return PlacementTable.from_json(controller.table()).versions
