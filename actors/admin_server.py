"""Serves the admin API from a thread of the controller's process."""

from __future__ import annotations

import socket
import threading
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp

from cluster.errors import ConfigError
from cluster.messages import AdminSettings

log = structlog.get_logger()

# Between two tries for an address that a controller before this one may hold for a moment.
_RETRY_S: Final = 1.0
# What requests that run get when it ends.
_GRACE_S: Final = 2


class AdminServer:
    """Of one deployment; requests are taken from when it is made until `close`."""

    def __init__(self, app: ASGIApp, settings: AdminSettings, *, patient: bool = False) -> None:
        """ConfigError if the address can't be had; with `patient` it is tried for on and on, in the background."""
        self.settings = settings
        self._closed = threading.Event()
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S
        )
        self._server = uvicorn.Server(config)
        taken = None if patient else _taken(settings)
        self._thread = threading.Thread(target=self._run, args=(taken,), name="expertmesh-admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, and give the address back."""
        self._closed.set()
        self._server.should_exit = True
        self._thread.join(_GRACE_S + 1)

    def _run(self, taken: socket.socket | None) -> None:
        while taken is None:
            try:
                taken = _taken(self.settings)
            except ConfigError as error:
                log.warning("no admin API yet", reason=error.message)
                if self._closed.wait(_RETRY_S):
                    return
        with taken:
            self._server.run(sockets=[taken])


def _taken(settings: AdminSettings) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((settings.host, settings.port))
        # So that nobody else gets it before the server's own thread comes to it.
        made.listen()
    except OSError as error:
        made.close()
        raise ConfigError(
            f"admin.port {settings.port} on {settings.host} can't be used: {error.strerror}",
            "set another, or end what listens there",
        ) from error
    return made
