"""From rows that nobody could answer for to the requests that they belong to.

One per engine process: the op of the model notes outages while a step runs, the scheduler takes them when it has
ended. Both run in the engine's one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.rescue import Outage

UNAVAILABLE = "expertmesh:unavailable:"
"""How the stop reason of a request begins that ended because an expert has no living replica."""
DEGRADED = "expertmesh"
"""Under this key of vLLM's `kv_transfer_params` a request's last output says how it was degraded."""
MANIFEST = "expertmesh_manifest"
"""Under this key of vLLM's `extra_args` a request names its manifest."""


@dataclass(slots=True)
class Hit:
    """Requests that a step could not compute, or only in part; by request id, with the reason."""

    failed: dict[str, str] = field(default_factory=dict)
    degraded: dict[str, str] = field(default_factory=dict)


class Outages:
    """Collects one step's outages."""

    def __init__(self) -> None:
        self._runner: Any = None
        self._hit = Hit()

    def attach(self, runner: Any) -> None:
        """vLLM's model runner: it knows which rows of the step are whose."""
        self._runner = runner

    def note(self, outage: Outage) -> None:
        """Rows of the step that runs now."""
        target = self._hit.degraded if outage.degraded else self._hit.failed
        for request_id in self.requests(outage.rows):
            target.setdefault(request_id, outage.reason)

    def take(self) -> Hit:
        """What was noted since the last call."""
        hit, self._hit = self._hit, Hit()
        return hit

    def rows(self) -> int:
        """How many rows of the step's batch belong to requests: the first ones. None of a warm-up's do."""
        batch = getattr(self._runner, "input_batch", None)
        if batch is None or not batch.num_reqs:
            return 0
        return int(self._runner.query_start_loc.np[batch.num_reqs])

    def runs(self) -> list[tuple[str, int]]:
        """The step's requests in the order of their rows: manifest ("" for none) and number of rows."""
        batch = getattr(self._runner, "input_batch", None)
        if batch is None or not batch.num_reqs:
            return []
        number, requests = batch.num_reqs, self._runner.requests
        starts = self._runner.query_start_loc.np[: number + 1].tolist()
        return [
            (manifest_of(requests.get(name)), end - start)
            for name, start, end in zip(batch.req_ids, starts, starts[1:], strict=False)
        ]

    def requests(self, rows: tuple[int, ...]) -> list[str]:
        """The requests that these rows of the step's batch belong to; none for a warm-up's rows."""
        batch = getattr(self._runner, "input_batch", None)
        if batch is None or not batch.num_reqs:
            return []
        # query_start_loc has each request's first row, and behind the last request the number of rows.
        ends = self._runner.query_start_loc.np[1 : batch.num_reqs + 1]
        found = np.unique(np.searchsorted(ends, np.asarray(rows), side="right"))
        return [batch.req_ids[index] for index in found if index < batch.num_reqs]


def manifest_of(request: Any) -> str:
    """The manifest that a request of vLLM's names; "" if none."""
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    return str(extra.get(MANIFEST, "")) if extra else ""
