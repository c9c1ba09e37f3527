"""The controller of a running server, asked from a process of its own.

A process can be connected to one Ray cluster only, and that of the tests may be to another one.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_SLOW_DOWN = "slow down"


class ControllerClient:
    """Connected for as long as the block lasts."""

    def __init__(self, config: Path, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, url), daemon=True)

    def __enter__(self) -> ControllerClient:
        self._process.start()
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.send(None)
        self._process.join(30)
        self._process.kill()

    def ask(self, method: str, *arguments: object) -> Any:
        """Its answer; what it raises, as RuntimeError if it is none of ours."""
        self._ours.send((method, arguments))
        return self._answer()

    def slow_down(self, host_id: str, floor_ms: float) -> None:
        """Have each layer of a host take so long at least; 0 for as fast as it can."""
        self._ours.send((_SLOW_DOWN, (host_id, floor_ms)))
        self._answer()

    def _answer(self) -> Any:
        assert self._ours.poll(180), "no answer"
        answer = self._ours.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, config: Path, url: str) -> None:
    from cluster.config import load_config
    from cluster.errors import ExpertmeshError
    from workloads.running import running_controller

    try:
        with running_controller(load_config(config, {}, {}, {}).config, url) as controller:
            connection.send(None)
            while (question := connection.recv()) is not None:
                try:
                    if question[0] == _SLOW_DOWN:
                        answer = _slow_down(*question[1])
                    else:
                        answer = controller.ask(question[0], *question[1])
                except ExpertmeshError as error:
                    answer = error
                except Exception as error:
                    answer = RuntimeError(f"{type(error).__name__}: {error}")
                connection.send(answer)
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _slow_down(host_id: str, floor_ms: float) -> None:
    import ray

    from actors.ray_hosts import RayHosts

    host = RayHosts(ray.get_runtime_context().namespace).find(host_id)
    assert host is not None
    if floor_ms:
        host.failpoint("slow_floor_ms", floor_ms, 30)
    # Which turns the floor on, and off.
    host.failpoint("slow", 1.01 if floor_ms else 1, 30)
