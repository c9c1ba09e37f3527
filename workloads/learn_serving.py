"""The server beside which the mesh learns: how busy it is, and what becomes of a version there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, Literal

import httpx

from cluster.canary import Trial
from cluster.errors import HostError, VersionConflictError
from cluster.version_changes import VersionsStatus
from workloads.live_version_commands import stage_when_free, wait_until_live
from workloads.running import RunningController

_STAGE_S: Final = 600.0
_METRICS_S: Final = 5.0
# How often the server is asked, and how many quiet answers it takes to go on.
_LOOK_S: Final = 1.0
_QUIET: Final = 3
_SERIES: Final = ("vllm:num_requests_running", "vllm:num_requests_waiting")

Trialled = Literal["waiting", "promoted", "rolled back", "gone"]


class Serving:
    """A running server's controller, as the loop uses it."""

    def __init__(self, controller: RunningController) -> None:
        self._controller = controller

    def status(self) -> VersionsStatus:
        """HostError if the server is gone."""
        import ray

        try:
            found: VersionsStatus = self._controller.ask("versions")
        except ray.exceptions.RayError as error:
            raise HostError(
                f"the server at {self._controller.url} is gone: {str(error).splitlines()[0]}",
                "when it runs again, begin again: it goes on with the same round",
            ) from error
        return found

    def stage(self, manifest: str) -> None:
        """Have the hosts load a version; returns when they have. VersionError if they can't."""
        stage_when_free(self._controller, manifest, _STAGE_S)
        wait_until_live(self._controller, manifest, _STAGE_S)

    def try_out(self, trial: Trial) -> bool:
        """Give a staged version to a share of requests; False while another one is on trial."""
        try:
            self._controller.ask("try_out", trial)
        except VersionConflictError as error:
            if "is on trial" in error.message:
                return False
            raise
        return True

    def share_out(self, shares: Mapping[str, Mapping[str, float]]) -> None:
        """Give new requests versions by lot; {} ends that. VersionError if it can't be."""
        self._controller.ask("share_out", shares)

    def promote(self, manifest: str, reason: str) -> None:
        """Give a version to all new requests. VersionError if it can't be."""
        self._controller.ask("promote", manifest, "expertmesh", reason, None)

    def trialled(self, manifest: str) -> tuple[Trialled, str]:
        """What has become of a version on trial, and why; "gone" if the server knows nothing of it."""
        status = self.status()
        if manifest in (status.candidate, status.promoting):
            return "waiting", status.verdict
        if status.serving == manifest:
            return "promoted", status.verdict
        if status.verdict.startswith(f"{manifest[:12]} rolled back"):
            return "rolled back", status.verdict.partition(": ")[2]
        return "gone", "the server knows nothing of a trial of it"


def requests_inside(url: str) -> float | None:
    """Requests that a server computes or that wait in it; None if it does not say."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=_METRICS_S).raise_for_status().text
    except httpx.HTTPError:
        return None
    found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(_SERIES)]
    return sum(map(float, found)) if found else None


class Pausing:
    """Whether learning is to wait for a server that has much to do; it may be asked as often as one likes."""

    def __init__(
        self,
        inside: Callable[[], float | None],
        above: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inside, self._above, self._clock = inside, above, clock
        self._looked = float("-inf")
        self._quiet = _QUIET

    def __call__(self) -> bool:
        if self._clock() - self._looked >= _LOOK_S:
            self._looked = self._clock()
            inside = self._inside()
            # One that does not answer has better things to do.
            busy = inside is None or inside > self._above
            self._quiet = 0 if busy else min(_QUIET, self._quiet + 1)
        return self._quiet < _QUIET
