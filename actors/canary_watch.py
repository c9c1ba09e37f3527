"""What one router sees of a version on trial and of the one that serves; the controller is told every few seconds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from actors.pinning import Pins
from cluster.canary import Answered, Observed

# Answers of which users may still say how they like them.
_REMEMBERED: Final = 10_000
# Most that is kept for a controller that does not answer.
_KEPT: Final = 10_000


class CanaryWatch:
    """Used in the router's event loop. Nothing is kept while no version is on trial."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._forget()

    def answered(self, request_id: str, manifest: str, *, failed: bool, metrics: Any = None) -> None:
        """A request ended; `metrics` are vLLM's of it."""
        candidate = self._pins.versions.candidate
        if not candidate:
            return
        self._answers[_name(request_id)] = manifest
        if len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)
        side = self._candidate if manifest == candidate else self._serving
        if len(side) < _KEPT:
            side.append(Answered(failed, _token_s(metrics)))

    def liked(self, answer_id: str, score: float) -> bool:
        """A user says how an answer was, from 0 to 1; whether the answer is known."""
        manifest = self._answers.get(answer_id)
        if manifest is None:
            return False
        side = self._liked_candidate if manifest == self._pins.versions.candidate else self._liked_serving
        if len(side) < _KEPT:
            side.append(score)
        return True

    def predicted(self, nats: float) -> None:
        """By how much the candidate predicted a held-out text worse, per token."""
        self._nats.append(nats)

    def take(self) -> Observed | None:
        """What was seen since the last call; None if nothing was."""
        candidate = self._pins.versions.candidate
        seen = Observed(
            candidate,
            tuple(self._serving),
            tuple(self._candidate),
            tuple(self._nats),
            tuple(self._liked_serving),
            tuple(self._liked_candidate),
        )
        self._forget()
        return seen if candidate and seen != Observed(candidate) else None

    def _forget(self) -> None:
        self._serving: list[Answered] = []
        self._candidate: list[Answered] = []
        self._nats: list[float] = []
        self._liked_serving: list[float] = []
        self._liked_candidate: list[float] = []


def _name(request_id: str) -> str:
    """Of the answer: vLLM adds the prompt's number to a completion's."""
    name, _, number = request_id.rpartition("-")
    return name if request_id.startswith("cmpl-") and number.isdigit() and name != "cmpl" else request_id


def _token_s(metrics: Any) -> float | None:
    tokens = getattr(metrics, "num_generation_tokens", 0)
    if tokens < 2:
        return None
    return max(0.0, float(metrics.last_token_ts - metrics.first_token_ts)) / (tokens - 1)
