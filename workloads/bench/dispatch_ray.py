"""What a dispatch would cost over Ray: an actor call, and the same actor in a compiled graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_TIMEOUT_S = 60.0
# A compiled graph reserves its channels; a little more than the payload, for Ray's own header.
_CHANNEL_SLACK_BYTES = 65_536


@contextlib.contextmanager
def actor_path(x: np.ndarray) -> Iterator[Callable[[], object]]:
    """One call of a Ray actor that returns the rows it is given."""
    with _actor() as actor:
        import ray

        yield lambda: ray.get(actor.echo.remote(x), timeout=_TIMEOUT_S)


@contextlib.contextmanager
def graph_path(x: np.ndarray) -> Iterator[Callable[[], object]]:
    """One execution of a compiled graph of that one actor."""
    with _actor() as actor:
        import ray
        from ray.dag import InputNode

        with InputNode() as rows:
            node = actor.echo.bind(rows)
        graph = node.experimental_compile(_buffer_size_bytes=x.nbytes + _CHANNEL_SLACK_BYTES)
        try:
            yield lambda: ray.get(graph.execute(x), timeout=_TIMEOUT_S)
        finally:
            graph.teardown()


@contextlib.contextmanager
def _actor() -> Iterator[Any]:
    import ray

    class Echo:
        def echo(self, rows: np.ndarray) -> np.ndarray:
            return rows

    actor: Any = ray.remote(num_cpus=0)(Echo).remote()
    try:
        yield actor
    finally:
        ray.kill(actor)
