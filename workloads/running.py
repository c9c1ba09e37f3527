"""The controller of the server that runs here, or on the cluster that the configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from cluster.config import Config
from cluster.errors import ExpertmeshError, HostError
from cluster.ray_cluster import connected
from workloads import run_file

NOTHING: Final = "nothing is deployed on this cluster"
START: Final = "start it with `expertmesh serve`"
_CALL_S: Final = 120.0


class NotRunningError(ExpertmeshError):
    """No server of expertmesh has this cluster."""


@dataclass(frozen=True)
class RunningController:
    """A controller that can be asked."""

    url: str
    """Of its server."""
    actor: Any

    def ask(self, method: str, *arguments: object) -> Any:
        """Its answer, or the ExpertmeshError that was raised over there."""
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=_CALL_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ExpertmeshError):
                raise error.cause from None
            raise
        except ray.exceptions.GetTimeoutError:
            raise HostError(
                f"the controller does not answer within {_CALL_S:g} s", "see `expertmesh status`"
            ) from None


@contextmanager
def running_controller(config: Config, url: str | None = None) -> Iterator[RunningController]:
    """The controller for a block; ExpertmeshError if there is none."""
    if config.ray.address == "local":
        run = run_file.the_one(url)
        settings = config.ray.model_copy(
            update={"address": run.ray_address, "namespace": run.namespace, "token_path": run.token_path}
        )
        url = run.url
    else:
        settings = config.ray
        url = url or f"http://{config.server.host}:{config.server.port}"
    with connected(settings):
        from actors import ray_controller

        actor = ray_controller.find(settings.namespace)
        if actor is None:
            raise NotRunningError(NOTHING, START)
        yield RunningController(url, actor)
