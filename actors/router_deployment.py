"""The router as a deployment of Ray Serve's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from actors.engine_words import engine_words
from actors.http_server import HttpServer
from actors.router import NextTable, Router
from cluster import niceness
from cluster.canary import Observed
from cluster.messages import RouterSpec, Traffic
from cluster.traffic import Routing

# For answers that are on their way when the engine has ended.
_CLOSE_S: Final = 1.0


def serve_application(
    spec: RouterSpec,
    fetch_table: Callable[[], str],
    next_table: NextTable,
    report: Callable[[Traffic], Routing | None],
    experts: Callable[[], str],
    observe: Callable[[Observed], None],
    *,
    replicas: int,
    options: dict[str, Any],
) -> Any:
    """The Ray Serve application of `replicas` routers; each gets its tables, and tells of its traffic, by
    these calls (see `Router`)."""
    import ray
    from ray import serve

    class RouterReplica:
        """Serve's view of a Router. It takes its port first, so that a port in use is found before a model loads."""

        async def __init__(self, spec: RouterSpec) -> None:  # type: ignore[misc]  # Serve awaits it
            # The engine's process inherits it.
            niceness.usual()
            node_id = ray.get_runtime_context().get_node_id()
            # Where other replicas hand requests on.
            host = ray.util.get_node_ip_address() if spec.spread else "127.0.0.1"
            self._inner = HttpServer(host, 0)
            inner = host, self._inner.port
            self._router = Router(spec, fetch_table, node_id, next_table, report, experts, observe, inner)
            self._http = HttpServer(spec.http_host, spec.http_port)
            try:
                app = await self._router.start()
            except Exception as error:
                # vLLM's own exception only says that its engine process said why.
                raise RuntimeError(engine_words() or str(error)) from error
            self._inner.start(self._router.handed_on(app), lifespan=False)
            self._http.start(app)

        async def check_health(self) -> None:
            await self._router.check_health()
            if not self._http.running:
                raise RuntimeError("the HTTP server has ended")

        async def set_table(self, table: str) -> int:
            return await self._router.set_table(table)

        async def stats(self) -> dict[str, Any]:
            return await self._router.stats()

        async def drain(self, grace_s: float) -> None:
            await self._router.drain(grace_s)
            await asyncio.gather(self._http.stop(_CLOSE_S), self._inner.stop(_CLOSE_S))

        def __del__(self) -> None:
            self._router.shutdown()

    deployment: Any = serve.deployment(RouterReplica, name="router", num_replicas=replicas, **options)
    return deployment.bind(spec)
