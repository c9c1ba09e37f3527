"""Routing traces: which experts each token chose, layer by layer, in the tokens' order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from cluster.errors import ConfigError
from cluster.fleet import LayerLoad, layer_load
from cluster.routing_windows import scenarios

_WINDOWS = 32


@dataclass(frozen=True)
class Trace:
    """A routing trace: `expert_ids` int [L, T, K], the experts that each of T tokens chose in each of L layers."""

    name: str
    expert_ids: np.ndarray
    num_experts: int

    @property
    def layers(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def tokens(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[2])

    def counts(self, first: int, last: int) -> np.ndarray:
        """float64 [L, E]: how often each expert was chosen by tokens `first` to `last`, the latter not included."""
        part = self.expert_ids[:, first:last].reshape(self.layers, -1).astype(np.int64)
        flat = part + np.arange(self.layers)[:, None] * self.num_experts
        counted = np.bincount(flat.ravel(), minlength=self.layers * self.num_experts)
        return counted.reshape(self.layers, self.num_experts).astype(np.float64)

    def windows(self, first: int, last: int, number: int = _WINDOWS) -> np.ndarray:
        """float64 [S, L, E]: counts of `number` windows, equally long but for one token, in the tokens' order."""
        edges = np.linspace(first, last, number + 1).astype(int)
        return np.stack([self.counts(a, b) for a, b in pairwise(edges)])


def loads_of(counts: np.ndarray, rows_per_step: float) -> list[LayerLoad]:
    """The planner's loads of all layers, blobs of one byte each, from the counts of windows [S, L, E]."""
    shares = scenarios(counts)
    return [layer_load(layer, 1, shares[:, layer], rows_per_step) for layer in range(shares.shape[1])]


def scaled(trace: Trace, layers: int, experts: int) -> Trace:
    """A larger trace made of a real one: further layers and blocks of experts are other layers of it.

    Every choice of a token falls into one of the blocks in turn, where it is what the token chose in the block's
    layer. `experts` must be a multiple of the trace's (ConfigError).
    """
    blocks, rest = divmod(experts, trace.num_experts)
    if rest or not blocks or layers < 1:
        raise ConfigError(
            f"a trace of {trace.num_experts} experts can't be scaled to {layers} layers of {experts}",
            f"--experts must be a multiple of {trace.num_experts}",
        )
    block = (np.arange(trace.tokens)[:, None] + np.arange(trace.top_k)) % blocks
    ids = np.empty((layers, trace.tokens, trace.top_k), np.int32)
    for layer in range(layers):
        for number in range(blocks):
            source = trace.expert_ids[(layer * blocks + number) % trace.layers]
            here = block == number
            ids[layer][here] = source[here].astype(np.int32) + number * trace.num_experts
    return Trace(f"{trace.name} as {layers} x {experts}", ids, experts)


def read_trace(file: Path) -> Trace:
    """Read an .npz file with `expert_ids` [L, T, K]; ConfigError if there is none or it makes no sense."""
    way_out = "see ../shared/data/README.md for the format"
    if not file.is_file():
        raise ConfigError(f"no routing trace {file}", way_out)
    try:
        with np.load(file, allow_pickle=False) as archive:
            ids = archive["expert_ids"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"routing trace {file} can't be read: {error}", way_out) from error
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0 or ids.min() < 0:
        raise ConfigError(
            f"routing trace {file}: expert_ids is {ids.dtype} {list(ids.shape)}, not [layers, tokens, top-k]",
            way_out,
        )
    # A trace says who was chosen, not who could have been: powers of two are what models have.
    highest = int(ids.max()) + 1
    return Trace(file.stem, ids, 1 << (highest - 1).bit_length() if highest > 1 else 1)
