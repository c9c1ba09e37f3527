"""What of a round goes to one of several hosts."""

from __future__ import annotations

import numpy as np
import torch

from actors.link import HostLink

# Marks an expert that another host answers for.
_NOT_HERE = np.int32(-1)


class Share:
    """One host's share of a round: the rows that need it, ids of other hosts' experts made -1.

    `fill` may be called again, for another attempt.
    """

    __slots__ = ("here", "ids", "link", "row_numbers", "rows", "weights", "x")

    def __init__(
        self,
        link: HostLink,
        row_numbers: np.ndarray,
        here: np.ndarray,
        x: np.ndarray,
        weights: np.ndarray,
        ids: np.ndarray,
    ) -> None:
        self.link, self.row_numbers, self.rows = link, row_numbers, len(row_numbers)
        self.here, self.x, self.weights, self.ids = here, x, weights, ids

    def fill(self) -> None:
        views = self.link.buffers.views(self.rows)
        rows, ids = self.row_numbers, np.where(self.here, self.ids, _NOT_HERE)
        # mode="clip" because the default checks bounds through a temporary copy; the rows are in bounds.
        self.x.take(rows, 0, out=views.x_raw, mode="clip")
        self.weights.take(rows, 0, out=views.weights_np, mode="clip")
        ids.take(rows, 0, out=views.ids_np, mode="clip")


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as integers of the item size: a copy needs no dtype, and NumPy has no bfloat16."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()
