"""The router's own HTTP server: vLLM's application on a socket of the replica.

Serve's proxy is left out of the path. It would pass every token on by an actor call, which costs milliseconds of
the cores that engine and experts share; Serve still starts, watches and replaces the replicas.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp

from cluster.errors import ConfigError

_KEEP_ALIVE_S = 5
_BACKLOG = 2048


class HttpServer:
    """Serves an application on `host` and `port`; the address is taken when it is made, or ConfigError.

    Replicas of one node share the port: the kernel spreads connections over those that listen, and a replica
    that dies takes none any more.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"server.port {port} on {host} can't be used: {error.strerror}", "choose another with --port"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        """Of the socket: one that is free where 0 was asked for."""
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether requests are being taken."""
        return self._task is not None and not self._task.done()

    def start(self, app: ASGIApp, *, lifespan: bool = True) -> None:
        """Take requests from now on, in the running event loop; without `lifespan` where another server of the same
        application begins and ends it.
        """
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="auto" if lifespan else "off",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            backlog=_BACKLOG,
        )
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self, grace_s: float) -> None:
        """Take no new connection, wait up to `grace_s` seconds for the open ones, close."""
        if self._server is None or self._task is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=grace_s)
        if not self._task.done():
            self._server.force_exit = True
            await asyncio.wait({self._task}, timeout=1.0)
        self._task.cancel()
        self._socket.close()
