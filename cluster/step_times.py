"""What a step's experts take beside what the hosts' costs say: how far off these are, and by how much all are.

Costs are medians of dispatches. A step waits for all its layers, those too that had to wait for a core, so that it
takes longer than its layers' medians together. By how much is for the machine to say and not for one host: the last
steps tell, and the next ones are expected to be as they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final, NamedTuple

# Fewer steps say what other processes happened to do.
_ENOUGH: Final = 8
# Errors that are kept.
_KEPT: Final = 512


class LayerTime(NamedTuple):
    """One layer's dispatch in a step."""

    predicted_s: float
    """By the costs of its hosts."""
    seconds: float


class StepTimes:
    """Of one deployment. A step is its layers' times, at least one."""

    def __init__(self) -> None:
        self.factor = 1.0
        """How many times as long as by the costs of its hosts a step is expected to take."""
        self._errors: deque[float] = deque(maxlen=_KEPT)
        self._layer_errors: deque[float] = deque(maxlen=_KEPT)

    @property
    def error(self) -> float | None:
        """Median of |predicted - measured| over measured time of steps; None without any."""
        return median(self._errors) if self._errors else None

    @property
    def layer_error(self) -> float | None:
        """The same of single layers, by the costs alone."""
        return median(self._layer_errors) if self._layer_errors else None

    @property
    def judged(self) -> int:
        """Steps that the error is of, the last ones."""
        return len(self._errors)

    def judge(self, steps: Iterable[Sequence[LayerTime]]) -> None:
        """Note how far off the expectation was, before anything is learnt from these steps."""
        for layers in steps:
            self._layer_errors.extend(
                abs(layer.predicted_s - layer.seconds) / layer.seconds for layer in layers
            )
            predicted, seconds = _sums(layers)
            self._errors.append(abs(predicted * self.factor - seconds) / seconds)

    def learn(self, steps: Sequence[Sequence[LayerTime]]) -> None:
        """Expect the next steps to be as these: the last ones, predicted by the costs as they are now.

        By the costs that they were judged with, a step would count what has been learnt since a second time.
        """
        ratios = [seconds / predicted for predicted, seconds in map(_sums, steps)]
        self.factor = median(ratios) if len(ratios) >= _ENOUGH else 1.0


def _sums(layers: Sequence[LayerTime]) -> tuple[float, float]:
    return sum(layer.predicted_s for layer in layers), sum(layer.seconds for layer in layers)
