"""What the mesh says of itself during a run, asked all the time: the same in fault-free runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from workloads.bench.chaos_mesh import Mesh
from workloads.bench.chaos_statistics import Table

PERIOD_S = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample(Generic[T]):
    """An answer and when it was asked for and came, in nanoseconds of CLOCK_MONOTONIC."""

    asked_ns: int
    at_ns: int
    value: T


StatsSample = Sample[Mapping[str, Any] | None]
HostsSample = Sample[dict[str, int | None] | None]


class Watcher:
    """A thread for each question, since the hosts' reports may wait for one of them while the others are well."""

    def __init__(self, mesh: Mesh) -> None:
        self.stats: list[StatsSample] = []
        self.hosts: list[HostsSample] = []
        self.tables: list[Sample[Table | None]] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._sample, args=(mesh.stats, self.stats), daemon=True),
            threading.Thread(target=self._sample, args=(mesh.hosts, self.hosts), daemon=True),
            threading.Thread(target=self._sample, args=(mesh.table, self.tables), daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _sample(self, ask: Callable[[], Any], samples: list[Sample[Any]]) -> None:
        while not self._stop.is_set():
            asked_ns = time.monotonic_ns()
            value = ask()
            samples.append(Sample(asked_ns, time.monotonic_ns(), value))
            self._stop.wait(PERIOD_S)


@contextlib.contextmanager
def watching(mesh: Mesh) -> Iterator[Watcher]:
    """A watcher for the length of the block."""
    watcher = Watcher(mesh)
    watcher.start()
    try:
        yield watcher
    finally:
        watcher.stop()


def all_in_use(stats: Sequence[StatsSample]) -> bool:
    """Whether the engine said last that it asks every host; an engine that does not say is taken to."""
    told = next((sample.value for sample in reversed(stats) if sample.value is not None), None)
    return not (told or {}).get("ejected")


def restored_ns(
    hosts: Sequence[HostsSample], stats: Sequence[StatsSample], last_fault_ns: int, dead: frozenset[int]
) -> int | None:
    """When all hosts were ready and the engine used them all, first seen after the last fault.

    Of `dead` pids none counts as ready. Both kinds of samples must have been asked for after the fault. An
    engine that does not say `ejected` is taken to use what is ready. None if it has not come to that.
    """
    found: list[tuple[int, str, bool]] = []
    for told in hosts:
        good = bool(told.value) and all(pid and pid not in dead for pid in (told.value or {}).values())
        found.append((told.at_ns, "hosts", good and told.asked_ns >= last_fault_ns))
    for counted in stats:
        good = counted.value is not None and not counted.value.get("ejected")
        found.append((counted.at_ns, "stats", good and counted.asked_ns >= last_fault_ns))
    now = {"hosts": False, "stats": False}
    for at_ns, kind, good in sorted(found):
        now[kind] = good
        if all(now.values()):
            return at_ns
    return None


def up_again_ns(stats: Sequence[StatsSample], fault_ns: int) -> int | None:
    """When the server first answered after it had not; None if it was never seen away, or did not return."""
    away = False
    for sample in stats:
        if sample.asked_ns >= fault_ns and sample.value is None:
            away = True
        elif away and sample.value is not None:
            return sample.at_ns
    return None
