"""Asks many hosts at once how they are, so that one that doesn't answer delays nobody."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import structlog

from cluster.ports import Host
from cluster.repair_state import HostDead, HostFailed, HostReady

log = structlog.get_logger()

Answer = HostReady | HostFailed | HostDead | None

_THREADS: Final = 16


class Rounds:
    """Keeps at most one question open at each host; used by one thread at a time."""

    def __init__(self, patience_s: float, round_s: float) -> None:
        """A host has `patience_s` to answer; a round waits for new questions only, for `round_s` at most."""
        self._patience_s = patience_s
        self._round_s = round_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="expertmesh-probe")
        self._open: dict[str, tuple[Host, Future[Answer]]] = {}

    def ask(self, hosts: Mapping[str, Host]) -> dict[str, tuple[Host, Answer]]:
        """What has been answered since the last round, by id, with the host that was asked."""
        # An answer of a launch that was replaced is of no use.
        self._open = {h: asked for h, asked in self._open.items() if hosts.get(h) is asked[0]}
        fresh = {
            host_id: (host, self._pool.submit(host.probe, self._patience_s))
            for host_id, host in hosts.items()
            if host_id not in self._open
        }
        wait([future for _, future in fresh.values()], self._round_s)
        self._open.update(fresh)
        answers: dict[str, tuple[Host, Answer]] = {}
        for host_id, (host, future) in list(self._open.items()):
            if not future.done():
                continue
            del self._open[host_id]
            try:
                answers[host_id] = host, future.result()
            except Exception as error:
                # Not known is not dead.
                log.warning("host not asked", host=host_id, reason=str(error))
        return answers

    def close(self) -> None:
        """Ask no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
