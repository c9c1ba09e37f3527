"""How many copies each expert gets: the rules of `placement.replicas`, laid over a model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Final

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from cluster.config_placement import HottestExperts, ReplicaRules
from cluster.errors import ConfigError
from cluster.messages import MoeLayer

RoutingCounts = Mapping[int, Sequence[int]]
"""Layer index → per expert how often it was chosen."""

_COUNTS: Final = TypeAdapter(dict[NonNegativeInt, list[NonNegativeInt]])
_KEY: Final = "placement.replicas"
_FORMAT: Final = "expected is a JSON object: by layer, a list of how often each of its experts was chosen"


def read_counts(rules: ReplicaRules) -> RoutingCounts:
    """The counts that the rules name, none if they name none; ConfigError if the file cannot be read."""
    if rules.hottest is None:
        return {}
    named = f"{_KEY}.hottest.counts: {rules.hottest.counts}"
    try:
        return _COUNTS.validate_json(Path(rules.hottest.counts).expanduser().read_bytes())
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of ~nobody
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{named} cannot be read: {reason}", _FORMAT) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise ConfigError(f"{named}: {place + ': ' if place else ''}{first['msg']}", _FORMAT) from None


def copies_per_expert(
    layers: Sequence[MoeLayer], rules: ReplicaRules, counts: RoutingCounts
) -> dict[int, tuple[int, ...]]:
    """Layer index → copies of each expert: the largest number that any rule gives it.

    Raises ConfigError for a rule or counts that are of other layers than the model's.
    """
    _known_layers(layers, rules.layers, f"{_KEY}.layers")
    copies = {}
    for layer in layers:
        least = max(rules.default, rules.layers.get(layer.index, 1))
        copies[layer.index] = (least,) * layer.num_experts
    if rules.hottest is None:
        return copies
    _check_counts(layers, rules.hottest, counts)
    for layer in layers:
        row, chosen = list(copies[layer.index]), counts[layer.index]
        # Experts that were chosen equally often: those with the low numbers, so that plans repeat.
        order = sorted(range(layer.num_experts), key=lambda expert: -chosen[expert])
        for expert in order[: max(1, ceil(rules.hottest.share * layer.num_experts))]:
            row[expert] = max(row[expert], rules.hottest.replicas)
        copies[layer.index] = tuple(row)
    return copies


def _check_counts(layers: Sequence[MoeLayer], hottest: HottestExperts, counts: RoutingCounts) -> None:
    named = f"{_KEY}.hottest.counts: {hottest.counts}"
    _known_layers(layers, counts, named)
    if missing := [layer.index for layer in layers if layer.index not in counts]:
        raise ConfigError(f"{named} has no layer {_joined(missing)}", _FORMAT)
    for layer in layers:
        if len(counts[layer.index]) != layer.num_experts:
            raise ConfigError(
                f"{named} counts {len(counts[layer.index])} experts in layer {layer.index}, "
                f"which has {layer.num_experts}",
                _FORMAT,
            )


def _known_layers(layers: Sequence[MoeLayer], named: Mapping[int, object], where: str) -> None:
    known = [layer.index for layer in layers]
    if strange := [index for index in named if index not in known]:
        raise ConfigError(
            f"{where}: the model has no layer {_joined(strange)} of experts",
            f"its layers of experts: {_joined(known)}",
        )


def _joined(indices: Sequence[int]) -> str:
    """``0-2, 5`` for 0, 1, 2 and 5, in any order."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
