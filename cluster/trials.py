"""Versions on trial: a share of requests, until it is clear whether they are good enough; then they serve, or go.

What is seen and what follows is decided in `cluster.canary`; here it is done, a step with every look of the controller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

import structlog

from cluster.canary import Canary, Observed, Trial, advanced, begun, observed, verdict
from cluster.deployment import with_table
from cluster.errors import VersionConflictError, VersionError
from cluster.ledger import Ledger
from cluster.live_versions import arms, same_engine, with_candidate, with_shares
from cluster.promotion import Retiring
from cluster.table import PlacementTable
from cluster.version_changes import Promoted, VersionChanges, not_loaded
from cluster.versions.aliases import Move

log = structlog.get_logger()

CANDIDATE: Final = "candidate"
"""The alias of a version on trial."""
_ROUNDING: Final = 1e-6


class Trials:
    """Of one controller; calls may come from several threads."""

    def __init__(
        self, ledger: Ledger, versions: VersionChanges, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._ledger, self._versions, self._wall = ledger, versions, wall

    @property
    def under_way(self) -> bool:
        """Whether a version is on trial."""
        deployment = self._ledger.deployment
        return deployment is not None and deployment.canary is not None

    def look(self) -> None:
        """Do with the version on trial what is to be done now."""
        deployment = self._ledger.deployment
        if deployment is None or deployment.canary is None or deployment.promotion is not None:
            return
        versions = PlacementTable.from_json(deployment.table).versions
        engines = self._versions.engines()
        if versions.pinned and versions.pinned not in engines:
            # After this controller was started it has heard of nobody for a while.
            if self._versions.has_heard_all():
                self.end("the engine that computed it is gone")
            return
        if set(engines) - set(versions.engines):
            self._on_trial(deployment.canary, engines)
        self._judge(deployment.canary)

    def try_out(self, trial: Trial) -> None:
        """Give a staged version to a share of new requests, and watch it; what becomes of it is decided by `look`.

        The alias ``candidate`` points at it from then on. VersionError if it is not staged, serves, is another model's
        router, or another one is on trial.
        """
        store, _ = self._versions.store()
        digest = store.find(trial.manifest)
        with self._ledger.change:
            deployment = self._ledger.required()
            versions = PlacementTable.from_json(deployment.table).versions
            if digest not in versions.live:
                raise not_loaded(digest)
            if digest == versions.serving:
                raise VersionConflictError(f"version {digest[:12]} serves already", "nothing is to be done")
            if deployment.canary is not None:
                raise VersionConflictError(
                    f"version {versions.candidate[:12]} is on trial",
                    "end that with promote or rollback first",
                )
            if versions.shares:
                raise VersionConflictError(
                    f"a bandit over {len(arms(versions))} versions is on trial",
                    "end that with `expertmesh learn bandit --end` first",
                )
            engines = self._versions.engines()
            if not same_engine(versions, digest, versions.serving) and len(engines) < 2:
                raise VersionConflictError(
                    f"version {digest[:12]} changes the engine's own weights, which one engine can't have twice",
                    "promote it as a whole, or start with engine.replicas: 2",
                )
            try:
                canary = begun(replace(trial, manifest=digest), self._wall())
            except ValueError as error:
                raise VersionError(str(error), "such as 1%,5%,25%,100%") from None
        now = store.aliases.current(CANDIDATE)
        if now is None or now.manifest != digest:
            store.aliases.move(CANDIDATE, Move((now.number if now else 0) + 1, digest, self._wall()))
        self._on_trial(canary, engines)

    def share_out(self, shares: Mapping[str, Mapping[str, float]]) -> int:
        """Give new requests versions by lot, with these probabilities by context, and "" for any other; {} ends that.

        Returns the epoch from which on it holds. VersionError for a version that is not loaded or that one engine can't
        compute beside what serves, for shares that don't add up, or while a version is on trial.
        """
        for context, of_context in shares.items():
            if min(of_context.values(), default=-1.0) < 0 or abs(sum(of_context.values()) - 1) > _ROUNDING:
                raise VersionError(
                    f"shares {dict(of_context)} of {context or 'any context'} are no parts of a whole",
                    "give shares that add up to 1",
                )
        with self._ledger.change:
            deployment, state = self._ledger.required(), self._ledger.repair
            table = PlacementTable.from_json(deployment.table)
            versions = table.versions
            among = {name for of_context in shares.values() for name in of_context}
            if shares and deployment.canary is not None:
                raise VersionConflictError(
                    f"version {versions.candidate[:12]} is on trial",
                    "end that with promote or rollback first",
                )
            if shares and deployment.promotion is not None:
                raise VersionConflictError("another version is being promoted", "try again in a moment")
            for name in sorted(among):
                if name not in versions.live:
                    raise not_loaded(name)
                if not same_engine(versions, name, versions.serving):
                    raise VersionConflictError(
                        f"version {name[:12]} changes the engine's own weights, which one engine can't have twice",
                        "share requests out among versions that change experts alone",
                    )
            if versions.shares == shares:
                return table.epoch
            table = replace(table, versions=with_shares(versions, shares))
            left = {name: r for name, r in deployment.retiring.items() if name not in among}
            deployment = replace(with_table(deployment, table), retiring=left)
            self._ledger.save(deployment, replace(state, epoch=state.epoch + 1))
            return state.epoch + 1

    def observe(self, seen: Observed) -> None:
        """What a router saw of the candidate and of the version that serves."""
        with self._ledger.change:
            deployment = self._ledger.deployment
            if deployment is not None and deployment.canary is not None:
                canary = observed(deployment.canary, seen)
                self._ledger.save(replace(deployment, canary=canary), self._ledger.repair)

    def _judge(self, canary: Canary) -> None:
        found = verdict(canary, self._wall())
        if found.what == "advance":
            log.info("canary advances", manifest=canary.trial.manifest[:12], reason=found.reason)
            self._on_trial(advanced(canary, self._wall()), self._versions.engines())
        elif found.what == "promote":
            log.info("canary promoted", manifest=canary.trial.manifest[:12], reason=found.reason)
            try:
                self._versions.promote(canary.trial.manifest, author="expertmesh", reason=found.reason)
            except VersionError as error:
                log.warning("canary not promoted", reason=error.message)
            else:
                self._note(f"{canary.trial.manifest[:12]} promoted: {found.reason}")
        elif found.what == "rollback":
            self.end(found.reason)

    def _on_trial(self, canary: Canary, engines: Collection[str]) -> None:
        with self._ledger.change:
            deployment, state = self._ledger.required(), self._ledger.repair
            table = PlacementTable.from_json(deployment.table)
            # One that is gone may only be silent; whoever asks it in vain asks the next.
            known = {*engines, *table.versions.engines}
            versions = with_candidate(table.versions, canary.trial.manifest, canary.share, known)
            deployment = replace(with_table(deployment, replace(table, versions=versions)), canary=canary)
            left = {name: r for name, r in deployment.retiring.items() if name != canary.trial.manifest}
            self._ledger.save(replace(deployment, retiring=left), replace(state, epoch=state.epoch + 1))

    def end(self, reason: str) -> Promoted:
        """Give the version on trial to nobody any more. VersionError if there is none."""
        started = time.monotonic()
        with self._ledger.change:
            deployment, state = self._ledger.required(), self._ledger.repair
            table = PlacementTable.from_json(deployment.table)
            versions, epoch = table.versions, state.epoch + 1
            candidate = versions.candidate
            if not candidate:
                raise VersionConflictError("no version is on trial", "see `expertmesh versions live`")
            table = replace(table, versions=with_candidate(versions, candidate, 0.0))
            retiring = {**deployment.retiring, candidate: Retiring(self._wall(), epoch)}
            told = f"{candidate[:12]} rolled back: {reason}"
            deployment = replace(with_table(deployment, table), canary=None, retiring=retiring, verdict=told)
            self._ledger.save(deployment, replace(state, epoch=epoch))
        log.warning("canary rolled back", manifest=candidate[:12], reason=reason)
        everywhere = self._versions.wait_for_engines(epoch)
        return Promoted(versions.serving, candidate, epoch, time.monotonic() - started, everywhere)

    def rollback(self, *, author: str = "", reason: str = "") -> Promoted:
        """End the trial that goes on; without one promote the version that served before.

        VersionError if there was none before, or hosts don't have it any more.
        """
        if self.under_way:
            return self.end(reason or "by hand")
        return self._versions.rollback(author=author, reason=reason)

    def _note(self, told: str) -> None:
        with self._ledger.change:
            self._ledger.save(replace(self._ledger.required(), verdict=told), self._ledger.repair)
