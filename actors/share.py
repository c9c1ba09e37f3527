"""What of a round goes to one of several hosts, and the sum of what comes back.

Shape suffixes as in `actors.dispatch`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from actors.link import HostLink
from actors.raw_memory import RawMemory
from actors.route import NOBODY, Owners

# Marks an expert that another host answers for.
_NOT_HERE = np.int32(-1)
# Up to here every host that has an expert of the batch gets all of its rows, chosen without NumPy: choosing
# rows, and adding the chosen ones up again, takes longer than copying them. As pairs, and as numbers in x.
_FEW_PAIRS, _FEW_NUMBERS = 32, 16_384


_raw_memory = lru_cache(maxsize=256)(RawMemory)


class Share(Protocol):
    """One host's share of a round."""

    position: int
    """Of the host in the route."""
    link: HostLink
    rows: int
    row_numbers: np.ndarray | None
    """Which rows of the round they are; None for all."""

    def fill(self) -> None:
        """Copy the share into the connection's memory; may be repeated, for another attempt."""
        ...

    def covers(self) -> np.ndarray:
        """bool [T, K]: the pairs of row and expert that the host computes."""
        ...

    def work(self) -> tuple[int, int]:
        """Pairs of row and expert that the host computes, and distinct experts."""
        ...


def shares(
    owners: Owners,
    links: Sequence[HostLink],
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    hosts_P: np.ndarray | None = None,
) -> Iterator[Share]:
    """The shares of the hosts that own an expert of the batch, in the order of `links`.

    An id of -1 wants no expert; those without an owner are in nobody's share. `hosts_P` says who answers each pair
    where an expert's rows are divided. IndexError for an id past the layer's.
    """
    pairs = ids_TK.numel()
    if hosts_P is None and pairs <= _FEW_PAIRS and x_TH.numel() <= _FEW_NUMBERS:
        of_pairs, of_rows = _raw_memory(4 * pairs), _raw_memory(x_TH.nbytes)
        ids = of_pairs[ids_TK.data_ptr()].cast("i").tolist()
        weights, x = of_pairs[weights_TK.data_ptr()], of_rows[x_TH.data_ptr()]
        owner_of = owners.listed
        hosts, rows = [owner_of[expert] for expert in ids], ids_TK.shape[0]
        for position in sorted(set(hosts)):
            if position != NOBODY:
                here = [expert if host == position else -1 for expert, host in zip(ids, hosts, strict=True)]
                yield _AllRows(position, links[position], rows, x, weights, array("i", here).tobytes())
        return
    x_np, weights_np, ids_np = raw(x_TH), weights_TK.numpy(), ids_TK.numpy()
    host_TK = owners.array.take(ids_np) if hosts_P is None else hosts_P.reshape(ids_np.shape)
    for position, link in enumerate(links):
        here_TK = host_TK == position
        chosen = np.flatnonzero(here_TK.any(axis=1))
        if chosen.size:
            yield _ChosenRows(position, link, chosen, here_TK, x_np, weights_np, ids_np)


def combine(parts: Sequence[Share], out_TH: torch.Tensor) -> None:
    """Write the sum of the shares that the links received, added in the parts' order."""
    # In float32: a sum in the model's dtype would round once per host.
    total_TH = out_TH if out_TH.dtype == torch.float32 else torch.empty(out_TH.shape)
    if parts and all(part.row_numbers is None for part in parts):
        first, *others = (part.link.buffers.views(part.rows).out for part in parts)
        if others and total_TH is out_TH:
            torch.add(first, others.pop(0), out=total_TH)
        else:
            total_TH.copy_(first)
        for share in others:
            total_TH.add_(share)
    else:
        total_TH.zero_()
        add(parts, total_TH)
    if total_TH is not out_TH:
        out_TH.copy_(total_TH)


def add(parts: Sequence[Share], total_TH: torch.Tensor) -> None:
    """Add the shares that the links received to a float32 sum, in the parts' order."""
    for part in parts:
        share = part.link.buffers.views(part.rows).out
        if part.row_numbers is None or part.rows == len(total_TH):
            total_TH.add_(share)
        else:
            total_TH.index_add_(0, torch.from_numpy(part.row_numbers), share.to(total_TH.dtype))


class _AllRows:
    """All rows of a round, ids of other hosts' experts made -1."""

    __slots__ = ("ids", "link", "position", "row_numbers", "rows", "weights", "x")

    def __init__(
        self, position: int, link: HostLink, rows: int, x: memoryview, weights: memoryview, ids: bytes
    ) -> None:
        self.position, self.link, self.rows = position, link, rows
        self.x, self.weights, self.ids = x, weights, ids
        self.row_numbers: np.ndarray | None = None

    def fill(self) -> None:
        views = self.link.buffers.views(self.rows)
        views.ids_bytes[:] = self.ids
        views.weights_bytes[:] = self.weights
        views.x_bytes[:] = self.x

    def covers(self) -> np.ndarray:
        return np.frombuffer(self.ids, np.int32).reshape(self.rows, -1) >= 0

    def work(self) -> tuple[int, int]:
        here = [expert for expert in array("i", self.ids) if expert >= 0]
        return len(here), len(set(here))


class _ChosenRows:
    """The rows that need a host, ids of other hosts' experts made -1."""

    __slots__ = ("_chosen", "here", "ids", "link", "position", "row_numbers", "rows", "weights", "x")

    def __init__(
        self,
        position: int,
        link: HostLink,
        row_numbers: np.ndarray,
        here: np.ndarray,
        x: np.ndarray,
        weights: np.ndarray,
        ids: np.ndarray,
    ) -> None:
        self.row_numbers: np.ndarray | None = row_numbers
        self.position, self.link = position, link
        self.rows, self._chosen = len(row_numbers), row_numbers
        self.here, self.x, self.weights, self.ids = here, x, weights, ids

    def fill(self) -> None:
        views = self.link.buffers.views(self.rows)
        rows, ids = self._chosen, np.where(self.here, self.ids, _NOT_HERE)
        # mode="clip" because the default checks bounds through a temporary copy; the rows are in bounds.
        self.x.take(rows, 0, out=views.x_raw, mode="clip")
        self.weights.take(rows, 0, out=views.weights_np, mode="clip")
        ids.take(rows, 0, out=views.ids_np, mode="clip")

    def covers(self) -> np.ndarray:
        return self.here

    def work(self) -> tuple[int, int]:
        ids = self.ids[self.here]
        return ids.size, np.unique(ids).size


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as integers of the item size: a copy needs no dtype, and NumPy has no bfloat16."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()
