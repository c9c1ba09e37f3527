"""Versions of a mesh that serves: staged, promoted, rolled back, and let go when nobody needs them any more."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from cluster import staging
from cluster.canary import verdict
from cluster.changes import Changes
from cluster.deployment import Deployment, with_table
from cluster.errors import HostError, VersionConflictError, VersionError
from cluster.in_use import TablesInUse
from cluster.ledger import Ledger
from cluster.live_versions import arms, serving, with_version, without_version
from cluster.messages import StoreAddress
from cluster.promotion import Promotion, Retiring
from cluster.table import PlacementTable
from cluster.version_check import checked
from cluster.versions.aliases import Move
from cluster.versions.store import Store

log = structlog.get_logger()


# How long `promote` waits for the engines' word that they use it; it goes on without.
_ENGINES_S: Final = 5.0
# Where this process is to end: tests cut promotions short by it.
_crash_at = ""


@dataclass(frozen=True, slots=True)
class Staged:
    """What a version takes to be ready."""

    manifest: str
    bytes_by_host: Mapping[str, int]
    """Of what hosts load for it; empty if they have all of it."""


@dataclass(frozen=True, slots=True)
class Promoted:
    """A version serves."""

    manifest: str
    before: str
    """The one that served before."""
    epoch: int
    seconds: float
    """From the request until every engine gave it to new requests."""
    everywhere: bool
    """Whether all engines have said so."""


@dataclass(frozen=True, slots=True)
class VersionsStatus:
    """Which versions a mesh can compute with."""

    serving: str
    live: tuple[str, ...]
    retiring: Mapping[str, Retiring]
    promoting: str = ""
    """The one that is being promoted."""
    coming: tuple[str, ...] = field(default=())
    """Versions that are being staged."""
    candidate: str = ""
    """The one on trial."""
    share: float = 0.0
    """Of new requests that it gets."""
    seen: tuple[int, int] = (0, 0)
    """Requests that were compared: of the version that serves, and of the candidate."""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Context → manifest → probability with which new requests get it, where they are shared out."""
    verdict: str = ""
    """On the trial that goes on, or else on the last one."""

    @property
    def needed(self) -> frozenset[str]:
        """All that must stay in the store."""
        return frozenset((*self.live, *self.coming, self.promoting or self.serving))


class VersionChanges:
    """Of one controller; calls may come from several threads."""

    def __init__(
        self,
        ledger: Ledger,
        changes: Changes,
        in_use: TablesInUse,
        *,
        open_store: Callable[[StoreAddress], Store] = lambda address: Store(address.url, address.options),
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._ledger, self._changes, self._in_use = ledger, changes, in_use
        self._open_store, self._wall = open_store, wall
        # One promotion at a time.
        self._promoting = threading.Lock()

    def status(self) -> VersionsStatus:
        """Which versions are live, and which one serves."""
        with self._ledger.change:
            deployment = self._ledger.required()
            versions = PlacementTable.from_json(deployment.table).versions
            following = deployment.following.versions if deployment.following is not None else None
            promotion = deployment.promotion
            return VersionsStatus(
                versions.serving,
                tuple(versions.live),
                deployment.retiring,
                promotion.move.manifest if promotion is not None else "",
                tuple(name for name in (following.live if following else ()) if name not in versions.live),
                versions.candidate,
                versions.share,
                deployment.canary.requests if deployment.canary is not None else (0, 0),
                versions.shares,
                verdict(deployment.canary, self._wall()).reason
                if deployment.canary is not None
                else deployment.verdict,
            )

    def stage(self, name: str) -> Staged:
        """Have the hosts load a version beside those that serve; returns while they do.

        `name` is an alias, or how the manifest's digest begins. VersionError if it is damaged, unsigned where it must
        be signed, of another model, or larger than the memory that hosts have left.
        """
        store, deployment = self.store()
        digest = store.find(name)
        model = PlacementTable.from_json(deployment.table).manifest
        # Until it is seen to run, who collects garbage must take it for young.
        store.manifests.renew(digest)
        manifest = checked(store, digest, model, deployment.version_settings)
        with self._ledger.change:
            snapshot = self._changes.snapshot()
            if snapshot is None:
                raise VersionConflictError(
                    "the hosts are still starting", "try again when `expertmesh status` says ready"
                )
            table = PlacementTable.from_json(snapshot.deployment.table)
            if digest in table.versions.live:
                self._keep(digest)
                return Staged(digest, {})
            sizes = snapshot.deployment.sizes
            coming = with_version(
                table.versions,
                digest,
                manifest.experts,
                sizes,
                manifest.dense,
                manifest.added,
                manifest.retired,
            )
            held = {host_id: said.weight_bytes for host_id, said in self._ledger.said.items()}
            loads = staging.bytes_by_host(snapshot.deployment, table, coming, held)
            staging.check_room(snapshot, held, loads)
            self._changes.follow(table.experts, f"stage {digest[:12]}", coming)
        self._changes.reconcile()
        return Staged(digest, loads)

    def unstage(self, name: str) -> None:
        """Let go of a version that does not serve, as soon as no request runs on it."""
        store, _ = self.store()
        digest = store.find(name)
        with self._ledger.change:
            deployment, state = self._ledger.required(), self._ledger.repair
            versions = PlacementTable.from_json(deployment.table).versions
            if digest in (versions.serving, versions.candidate, *arms(versions)):
                raise VersionConflictError(
                    f"version {digest[:12]} serves", "promote another one, or end its trial, first"
                )
            if digest not in versions.live:
                raise VersionConflictError(
                    f"version {digest[:12]} is not loaded", "see `expertmesh versions list`"
                )
            retiring = {**deployment.retiring, digest: Retiring(0.0, state.epoch)}
            self._ledger.save(replace(deployment, retiring=retiring), state)

    def promote(
        self, name: str, *, author: str = "", reason: str = "", continue_running: bool | None = None
    ) -> Promoted:
        """Give a staged version to all new requests, and move the alias there.

        VersionError if it is not staged, or somebody else moves the alias meanwhile: nothing is changed then. If the
        store can't be reached any more, the promotion is finished when it can.
        """
        started = time.monotonic()
        if not self._promoting.acquire(blocking=False):
            raise VersionConflictError("another version is being promoted", "see `expertmesh versions list`")
        try:
            store, deployment = self.store()
            digest, alias = store.find(name), deployment.version_settings.alias
            if deployment.promotion is not None:
                self._finish(store, deployment.promotion)
            now = store.aliases.current(alias)
            with self._ledger.change:
                deployment, state = self._ledger.required(), self._ledger.repair
                versions = PlacementTable.from_json(deployment.table).versions
                if digest not in versions.live:
                    raise not_loaded(digest)
                if digest == versions.serving and now is not None and now.manifest == digest:
                    raise VersionConflictError(
                        f"version {digest[:12]} serves already", "nothing is to be done"
                    )
                before = versions.serving
                move = Move((now.number if now else 0) + 1, digest, self._wall(), author, reason)
                if continue_running is None:
                    continue_running = deployment.version_settings.continue_running
                promotion = Promotion(alias, move, continue_running)
                self._ledger.save(replace(deployment, promotion=promotion), state)
            crash_here("promotion written down")
            epoch = self._finish(store, promotion)
            everywhere = self.wait_for_engines(epoch)
            return Promoted(digest, before, epoch, time.monotonic() - started, everywhere)
        finally:
            self._promoting.release()

    def rollback(self, *, author: str = "", reason: str = "") -> Promoted:
        """Promote the version that served before. VersionError if there was none, or it is not loaded any more."""
        store, deployment = self.store()
        alias = deployment.version_settings.alias
        moves = store.aliases.history(alias, 2)
        if len(moves) < 2:
            raise VersionConflictError(f"{alias} has been at one version only", "there is none to go back to")
        return self.promote(moves[0].manifest, author=author, reason=reason or "rollback")

    def look(self) -> None:
        """Finish a promotion that a controller before this one began, and let go of versions that nobody needs."""
        with self._ledger.change:
            deployment = self._ledger.deployment
        if deployment is None:
            return
        if deployment.promotion is None and not deployment.retiring:
            return
        if deployment.promotion is not None and self._promoting.acquire(blocking=False):
            try:
                store, deployment = self.store()
                if deployment.promotion is not None:
                    self._finish(store, deployment.promotion)
            except VersionError as error:
                log.warning("promotion not finished", reason=error.message)
            finally:
                self._promoting.release()
        self._let_go()

    def _finish(self, store: Store, promotion: Promotion) -> int:
        """From wherever a promotion is to its end; the epoch from which on it holds.

        VersionConflictError if the alias was moved by somebody else: the promotion is crossed out. Any other
        VersionError leaves it to be finished later, since nobody knows whether the alias was moved.
        """
        move = promotion.move
        now = store.aliases.current(promotion.alias)
        try:
            if now is None or now.number < move.number:
                store.aliases.move(promotion.alias, move)
            elif store.aliases.history(promotion.alias, 1 + now.number - move.number)[0] != move:
                raise VersionConflictError(
                    f"alias {promotion.alias} was moved by somebody else meanwhile",
                    "see where it points now, and try again",
                )
        except VersionConflictError:
            with self._ledger.change:
                self._ledger.save(replace(self._ledger.required(), promotion=None), self._ledger.repair)
            raise
        crash_here("alias moved")
        with self._ledger.change:
            deployment, state = self._ledger.required(), self._ledger.repair
            table = PlacementTable.from_json(deployment.table)
            before, epoch = table.versions.serving, state.epoch + 1
            versions = serving(table.versions, move.manifest, continue_running=promotion.continue_running)
            deployment = with_table(deployment, replace(table, versions=versions))
            retiring = {name: r for name, r in deployment.retiring.items() if name != move.manifest}
            if before != move.manifest:
                retiring[before] = Retiring(self._wall(), epoch)
            if deployment.canary is not None and deployment.canary.trial.manifest != move.manifest:
                retiring[deployment.canary.trial.manifest] = Retiring(self._wall(), epoch)
            deployment = replace(deployment, promotion=None, retiring=retiring, canary=None)
            self._ledger.save(deployment, replace(state, epoch=epoch))
        crash_here("table published")
        log.info("version serves", manifest=move.manifest[:12], before=before[:12], epoch=epoch)
        return epoch

    def wait_for_engines(self, epoch: int) -> bool:
        """Whether all engines say in time that they give requests what this table says."""
        with self._ledger.change:
            return self._ledger.change.wait_for(
                lambda: self._in_use.acknowledged(epoch, self._ledger.now()), _ENGINES_S
            )

    def engines(self) -> list[str]:
        """Names of the engines that there are."""
        with self._ledger.change:
            return self._in_use.names(self._ledger.now())

    def has_heard_all(self) -> bool:
        """Whether an engine that lives has asked for its table since this controller began."""
        with self._ledger.change:
            return self._ledger.now() - self._in_use.since > self._in_use.silence_s

    def _let_go(self) -> None:
        with self._ledger.change:
            deployment, state = self._ledger.deployment, self._ledger.repair
            if deployment is None or not deployment.retiring or deployment.following is not None:
                return
            if deployment.promotion is not None:
                return  # it may be of a version that would go
            keep, now = deployment.version_settings.keep_warm_s, self._wall()
            for name, retiring in deployment.retiring.items():
                if now - retiring.since < keep or not self._in_use.done_with(
                    name, retiring.epoch, self._ledger.now()
                ):
                    continue
                table = PlacementTable.from_json(deployment.table)
                table = replace(table, versions=without_version(table.versions, name))
                left = {other: r for other, r in deployment.retiring.items() if other != name}
                deployment = replace(with_table(deployment, table), retiring=left)
                self._ledger.save(deployment, replace(state, epoch=state.epoch + 1))
                log.info("version let go", manifest=name[:12])
                return

    def _keep(self, digest: str) -> None:
        """Not to be let go for its age: somebody staged it anew."""
        with self._ledger.change:
            deployment = self._ledger.required()
            if digest in deployment.retiring:
                left = {name: r for name, r in deployment.retiring.items() if name != digest}
                self._ledger.save(replace(deployment, retiring=left), self._ledger.repair)

    def store(self) -> tuple[Store, Deployment]:
        """The store of versions, and the deployment. VersionError if there is none."""
        with self._ledger.change:
            deployment = self._ledger.required()
        if deployment.store is None:
            raise VersionConflictError(
                "this mesh has no store of versions", "set versions.store and start it again"
            )
        return self._open_store(deployment.store), deployment


def not_loaded(digest: str) -> VersionConflictError:
    """A version is to serve that hosts don't have."""
    return VersionConflictError(
        f"version {digest[:12]} is not loaded", f"`expertmesh versions stage {digest[:12]}` first"
    )


def crash_at(step: str) -> None:
    """Have this process end at once when it comes to this step. HostError where failpoints are not allowed."""
    global _crash_at
    if os.environ.get("EXPERTMESH_FAILPOINTS") != "1":
        raise HostError("failpoints are not allowed here", "start the server with EXPERTMESH_FAILPOINTS=1")
    _crash_at = step


def crash_here(step: str) -> None:
    """End this process if it is to crash at this step."""
    if step == _crash_at:
        os.kill(os.getpid(), signal.SIGKILL)
