"""What a controller knows of its deployment, saved before anything is done by it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.deployment import Deployment, from_document, to_document
from cluster.errors import HostError
from cluster.ports import Host, Store
from cluster.repair_state import HostReady, Repair


class Ledger:
    """Read and changed while `change` is held."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self.change = threading.Condition()
        self.deployment: Deployment | None = None
        self.repair = Repair({})
        self.running: dict[str, Host] = {}
        """Launches that may live."""
        self.said: dict[str, HostReady] = {}
        """What hosts that are ready last said of themselves. Not saved: they say it again with every look."""
        self.heard: dict[str, float] = {}
        """When they said it, by the controller's clock."""

    def save(self, deployment: Deployment, state: Repair) -> None:
        """Before anything is done: a successor that knew less would launch again, or use an epoch twice."""
        self._store.save(to_document(deployment, state, self._clock()))
        self.deployment, self.repair = deployment, state
        self.change.notify_all()

    def load(self) -> bool:
        """Take up what a predecessor saved; whether there was anything."""
        text = self._store.load()
        if text:
            self.deployment, self.repair = from_document(text, self._clock())
        return bool(text)

    def clear(self) -> dict[str, Host]:
        """Forget the deployment, but for the store's copy; the launches that may live."""
        running, self.running, self.deployment = self.running, {}, None
        self.repair = Repair({})
        self.said.clear()
        self.heard.clear()
        self.change.notify_all()
        return running

    def forget(self) -> None:
        """Let no successor find anything."""
        self._store.save(b"")

    def required(self) -> Deployment:
        """The deployment. HostError if there is none."""
        if self.deployment is None:
            raise HostError("nothing is deployed on this cluster", "start it with `expertmesh serve`")
        return self.deployment

    def now(self) -> float:
        """Seconds by the controller's clock."""
        return self._clock()
