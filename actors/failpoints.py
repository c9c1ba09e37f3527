"""Faults that a test may switch on in a host: computing slowly, and taking memory.

Only with EXPERTMESH_FAILPOINTS=1 in the host's environment; nothing of this is in a host's way otherwise,
since a layer's `compute` is replaced only while a failpoint is on.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from cluster.errors import HostError

VARIABLE = "EXPERTMESH_FAILPOINTS"

_HOARD_S_PER_MIB: Final = 1 / 512
NAMES = ("slow", "slow_floor_ms", "hoard_mib")


class Layer(Protocol):
    """What a failpoint changes: `actors.hosted_layer.HostedLayer`."""

    compute: Callable[..., None]


def enabled(environ: Mapping[str, str]) -> bool:
    """Whether this process may be made to fail."""
    return environ.get(VARIABLE) == "1"


class Failpoints:
    """The failpoints of one host.

    `slow` is a factor: each compute takes that many times its time, at least `slow_floor_ms` milliseconds;
    `slow` = 1 turns both off. `hoard_mib` is memory that the host takes and keeps, until it is set to 0.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._enabled = enabled(environ)
        self._clock, self._sleep = clock, sleep
        self._floor_s = 0.0
        self._hoard: mmap.mmap | None = None
        self._own: dict[int, tuple[Layer, Callable[..., None]]] = {}

    def set(self, layers: Iterable[Layer], name: str, value: float) -> None:
        """Give one failpoint of all `layers` a value. HostError if they are off, or it makes no sense."""
        if not self._enabled:
            raise HostError("failpoints are off in this host", f"start the server with {VARIABLE}=1")
        if name not in NAMES:
            raise HostError(f"there is no failpoint {name!r}", f"there are: {', '.join(NAMES)}")
        if name == "slow_floor_ms":
            if value < 0:
                raise HostError(f"failpoint slow_floor_ms = {value:g}: below zero")
            self._floor_s = value / 1e3
            return
        if name == "hoard_mib":
            self._hoard_mib(int(value))
            return
        if value < 1:
            raise HostError(f"failpoint slow = {value:g}: a host can't be made faster", "1 turns it off")
        for layer, compute in self._own.values():
            layer.compute = compute
        self._own.clear()
        if value == 1:
            self._floor_s = 0.0
            return
        for layer in layers:
            self._own[id(layer)] = (layer, layer.compute)
            layer.compute = self._slowed(layer.compute, value)

    def _hoard_mib(self, size: int) -> None:
        # A mapping of its own goes back to the system when it is dropped.
        self._hoard = mmap.mmap(-1, size << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if size else None
        if self._hoard is None:
            return
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._hoard))
        for number in range(size):
            # At the pace of a fast leak, not as fast as the kernel can, and with Python's lock given back as native
            # code does: memory is what is to run out here, not time.
            ctypes.memset(first + (number << 20), 1, 1 << 20)
            self._sleep(_HOARD_S_PER_MIB)

    def _slowed(self, compute: Callable[..., None], factor: float) -> Callable[..., None]:
        clock = self._clock

        def slowed(*operands: object) -> None:
            started = clock()
            compute(*operands)
            taken = clock() - started
            if (rest := max(taken * factor, self._floor_s) - taken) > 0:
                self._sleep(rest)

        return slowed
