"""Asks many hosts at once how they are, so that one that doesn't answer delays nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Final

import structlog

from cluster.messages import HostProgress, HostReport, HostSpec
from cluster.ports import Host
from cluster.repair_state import HostDead, HostFailed, HostReady, HostState

log = structlog.get_logger()

Answer = HostReady | HostFailed | HostDead | None

_THREADS: Final = 16
# A host that loads answers quickly all the same: loading runs in a thread of its own.
_CALL_TIMEOUT_S: Final = 10.0


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


def progress(
    specs: Sequence[HostSpec], running: Mapping[str, Host], hosts: Mapping[str, HostState]
) -> list[HostProgress]:
    """How far each host is with loading, and why one can't be loaded."""

    def ask(spec: HostSpec) -> HostProgress:
        # Its process may still be starting, for which a busy node may need longer than a call.
        state = HostProgress(spec.host_id, 0, len(spec.experts), ready=False, error="")
        host = running.get(spec.host_id)
        if host is None:
            return replace(state, error=hosts[spec.host_id].reason)
        try:
            return host.progress(_CALL_TIMEOUT_S)
        except TimeoutError:
            return state
        except Exception as error:
            return replace(state, error=in_short(error))

    with ThreadPoolExecutor(max(1, len(specs))) as pool:
        return list(pool.map(ask, specs))


def reports(running: Mapping[str, Host], hosts: Mapping[str, HostState]) -> dict[str, HostReport | str]:
    """Per host its report, or why there is none."""

    def ask(host_id: str) -> HostReport | str:
        host = running.get(host_id)
        if host is None:
            return hosts[host_id].reason or hosts[host_id].phase.value
        try:
            return host.report(_CALL_TIMEOUT_S)
        except TimeoutError:
            return "does not answer"
        except Exception as error:
            return in_short(error)

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(ask, hosts), strict=True))


def in_short(error: Exception) -> str:
    """The last line of what an error says, which in Ray's is the error of the other side."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
