"""Which version each row of a step is for, and the numbers of its experts.

A request names its manifest from its first token to its last (`actors.pinning`). The router of the model chooses
experts; here the choice of each row becomes the numbers that its version's experts go by, so that everything behind,
from the split over hosts to the kernel, knows nothing of versions. One step may have rows of several.

Shape suffixes: T = tokens of the step, K = top-k, E = experts of the layer, V = versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch

from cluster.live_versions import LiveVersions

_UNKNOWN: Final = -1
# One set of buffers per distinct row count, as in `actors.buffers`.
_MOST_KEPT: Final = 512

Runs = Sequence[tuple[str, int]]
"""The step's requests in the order of their rows: manifest ("" for none) and number of rows."""


class RowVersions:
    """Of one engine process, used by the thread that steps."""

    def __init__(self, runs: Callable[[], Runs], on_unknown: Callable[[tuple[int, ...]], None]) -> None:
        """`runs` tells of the step that runs now; rows of a version that is not live compute nothing, and
        `on_unknown` is told of them, once a step.
        """
        self._runs, self._on_unknown = runs, on_unknown
        self._index: dict[str, int] = {}
        self._serving = 0
        self._maps: dict[int, np.ndarray] = {}
        self._same: set[tuple[int, int]] = set()
        """(Layer, version) whose numbers are the ids themselves."""
        self._first = 0
        self._uniform = 0
        self._rows_T1 = np.empty((0, 1), np.int32)
        self._buffers: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, torch.Tensor]] = {}
        self.plain = True
        """Whether a row's numbers are the router's choice, whatever its version."""

    def set_versions(self, versions: LiveVersions, sizes: Mapping[int, int]) -> None:
        """From the next step on; `sizes`: layer index → experts of the base checkpoint."""
        names = list(versions.live)
        self._index = {name: position for position, name in enumerate(names)}
        for name, other in versions.continued.items():
            self._index[name] = self._index[other]
        self._serving = self._index.get(versions.serving, 0)
        self._maps = {}
        self._same = set()
        for layer, size in sizes.items():
            # By id + 1, since -1 wants no expert; the last row is that of a version that is not live. Ids behind the
            # base checkpoint's are of experts that some versions have added: no other version's router chooses them.
            added = [max(of_layer.get(layer, (-1,))) + 1 for of_layer in versions.added.values()]
            map_VE = np.full((len(names) + 1, max(size, *added, 0) + 1), -1, np.int32)
            own = np.arange(-1, size, dtype=np.int32)
            map_VE[:_UNKNOWN, : size + 1] = own
            for position, name in enumerate(names):
                for expert, number in versions.live[name].get(layer, {}).items():
                    map_VE[position, expert + 1] = number
                if (map_VE[position, : size + 1] == own).all() and not versions.added.get(name, {}).get(
                    layer
                ):
                    self._same.add((layer, position))
            self._maps[layer] = map_VE
        self._first = min(sizes, default=0)
        # A table that names no version is of the checkpoint as it is.
        self.plain = not names or (len(names) == 1 and len(self._same) == len(self._maps))

    def numbers(self, layer: int, ids_TK: torch.Tensor) -> torch.Tensor:
        """The numbers for these choices, int32 [T, K]; valid until the next call with as many rows."""
        if layer == self._first:
            self._begin(len(ids_TK))
        uniform = self._uniform
        if uniform >= 0 and (layer, uniform) in self._same:
            return ids_TK
        index_TK, numbers_TK, tensor = self._buffer(*ids_TK.shape)
        map_VE = self._maps[layer]
        ids = ids_TK.numpy()
        if uniform >= 0:
            np.add(ids, 1, out=index_TK)
            np.take(map_VE[uniform], index_TK, out=numbers_TK, mode="clip")
        else:
            # mode="clip": the default checks bounds through a copy, and ids are the layer's own.
            np.add(ids, self._rows_T1 * map_VE.shape[1] + 1, out=index_TK)
            np.take(map_VE, index_TK, out=numbers_TK, mode="clip")
        return tensor

    def _begin(self, rows: int) -> None:
        """See whose rows they are that this step computes."""
        runs = self._runs()
        find, known = self._index.get, self._serving
        positions = [find(name, _UNKNOWN) if name else known for name, _ in runs]
        if not positions:
            self._uniform = known
            return
        if positions.count(positions[0]) == len(positions) and positions[0] != _UNKNOWN:
            self._uniform = positions[0]
            return
        self._uniform = _UNKNOWN
        # Rows behind the last request's are padding.
        self._rows_T1 = np.full((rows, 1), known, np.int32)
        ends = np.cumsum([count for _, count in runs])
        filled = np.repeat(np.array(positions, np.int32), [count for _, count in runs])[:rows]
        unknown = np.flatnonzero(filled == _UNKNOWN)
        # A row of its own, behind those of the versions that live.
        filled[unknown] = len(self._maps[self._first]) - 1
        self._rows_T1[: min(rows, int(ends[-1])), 0] = filled
        if len(unknown):
            self._on_unknown(tuple(unknown.tolist()))

    def _buffer(self, rows: int, top_k: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        found = self._buffers.get((rows, top_k))
        if found is None:
            if len(self._buffers) >= _MOST_KEPT:
                self._buffers.clear()
            # intp, or NumPy would make a copy of the indices.
            numbers = np.empty((rows, top_k), np.int32)
            found = np.empty((rows, top_k), np.intp), numbers, torch.from_numpy(numbers)
            self._buffers[rows, top_k] = found
        return found
