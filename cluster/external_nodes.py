"""Nodes that somebody else brings, who asks what is wanted: `ray.nodes: operator`.

Nothing is called here. What the autoscaler wants is remembered, and told to whoever asks the admin API for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from cluster.node_shape import NodeShape, in_words

# An operator looks every few seconds: one that has not for so long is not there.
_SILENT_S: Final = 60.0


class ExternalNodeProvider:
    """Of one controller's process; calls may come from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wanted: Mapping[str, NodeShape] = {}
        self._asked_at: float | None = None

    def request(self, wanted: Mapping[str, NodeShape]) -> None:
        """There is to be room for all of it."""
        self._wanted = {group: shape for group, shape in sorted(wanted.items()) if shape.count}

    def wanted(self) -> Mapping[str, NodeShape]:
        """What there is to be room for, for whoever brings nodes."""
        self._asked_at = self._clock()
        return self._wanted

    def describe(self) -> str:
        """What is wanted, and whether anybody heard."""
        rooms = [f"{group} {in_words(shape)}" for group, shape in self._wanted.items()]
        what = f"the operator is to have room for {', '.join(rooms)}" if rooms else "no nodes are wanted"
        if self._asked_at is None:
            return f"{what}; nobody ever asked: does `expertmesh operator` run?"
        silent = self._clock() - self._asked_at
        if silent > _SILENT_S:
            return f"{what}; nobody asked for {silent:.0f} s: does `expertmesh operator` run?"
        return what
