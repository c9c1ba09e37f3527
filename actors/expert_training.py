"""Training of some of a model's weights: new text, old text beside it, and a pull towards the version before.

    loss = cross entropy of new and replayed rows + beta * KL(version before | now)

Everything that the next step depends on is in `state`: taken up again it gives the same losses.

Shape suffixes: B = rows of a step, T = tokens of a row, V = vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from cluster.errors import LearningError

# Norms of gradients that the bound on the next one is taken from.
_NORMS: Final = 50


class Weights(Protocol):
    """What is trained of a model; see `actors.expert_slices` and `actors.whole_weights`."""

    @property
    def masters(self) -> Mapping[Any, nn.Parameter]:
        """In float32; the model computes with what was written of them last."""

    def take_gradients(self) -> None:
        """Give each master its gradient, and take the model's."""

    def write(self) -> None:
        """Have the model compute with what the masters are now."""

    def as_before(self) -> AbstractContextManager[None]:
        """Within the block the model computes as it did before it was trained."""

    def state(self) -> dict[str, torch.Tensor]:
        """The masters, to be put down."""

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take them up again. LearningError if they are of other weights."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How weights are trained."""

    steps: int
    rate: float = 1e-3
    """Largest learning rate."""
    warm_steps: int = 10
    """Over which the rate rises; it falls to a tenth of it until the end."""
    beta: float = 0.1
    """Weight of the pull towards the version before."""
    clip: float = 2.0
    """Most that a gradient's norm may be, over the median of the last ones."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What one step saw."""

    step: int
    loss: float
    cross_entropy: float
    """Nats per token."""
    divergence: float
    """KL from the version before, nats per token; 0 where nothing pulls towards that."""
    norm: float
    """Of the gradient, before it was bounded."""


class Training:
    """Of one model, in one process; several with a part of the rows each are one, if `total` adds up what they have."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Weights,
        settings: TrainSettings,
        *,
        aside: Callable[[], torch.Tensor | None] | None = None,
        total: Callable[[Sequence[torch.Tensor]], None] = lambda tensors: None,
        apart: bool = False,
    ) -> None:
        """`aside`: called after each forward pass, something to be added to the loss; `total`: adds to each tensor, in
        place, what the other workers have there; `apart`: each worker has masters of its own, whose gradients are whole
        as they are (`actors.expert_parallel`).
        """
        self._model, self.weights, self._settings = model, chosen, settings
        self._aside, self._total, self._apart = aside or (lambda: None), total, apart
        self._device = next(model.parameters()).device
        self.step = 0
        """Steps that were made."""
        self._norms: deque[float] = deque(maxlen=_NORMS)
        self._optimiser = torch.optim.AdamW(
            list(chosen.masters.values()), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    @property
    def pulls(self) -> bool:
        """Whether the version before is asked at each step."""
        return self._settings.beta > 0

    def train(self, rows_BT: torch.Tensor, part: float = 1.0) -> Trained:
        """One step over rows of token numbers, new ones and replayed ones; they are this `part` of all workers' rows.

        LearningError if the loss is not a number: nothing is changed then.
        """
        settings, rows_BT = self._settings, rows_BT.to(self._device)
        before_BTV = None
        if settings.beta:
            with torch.no_grad(), self.weights.as_before():
                before_BTV = F.log_softmax(self._logits(rows_BT), dim=-1)
            # Of that pass nothing is to be heard.
            self._aside()
        now_BTV = F.log_softmax(self._logits(rows_BT), dim=-1)
        cross_entropy = F.nll_loss(now_BTV[:, :-1].flatten(0, 1), rows_BT[:, 1:].flatten())
        divergence = torch.zeros((), device=self._device)
        if before_BTV is not None:
            divergence = F.kl_div(now_BTV, before_BTV, log_target=True, reduction="sum") / rows_BT.numel()
        loss = cross_entropy + settings.beta * divergence
        if (more := self._aside()) is not None:
            loss = loss + more
        seen = torch.stack((loss, cross_entropy, divergence)).detach() * part
        self._total([seen])
        if not torch.isfinite(seen[0]):
            raise LearningError(
                f"step {self.step + 1}: the loss is {seen[0].item()}", "look at the text, or lower the rate"
            )
        (loss * part).backward()
        self.weights.take_gradients()
        norm = self._bounded(list(self.weights.masters.values()))
        for group in self._optimiser.param_groups:
            group["lr"] = rate(settings, self.step)
        self._optimiser.step()
        self.weights.write()
        self.step += 1
        summed, of_text, of_pull = seen.tolist()
        return Trained(self.step, summed, of_text, of_pull, norm)

    def _bounded(self, masters: Sequence[nn.Parameter]) -> float:
        """The norm of all workers' gradients together, before they are held to the bound that the last ones set."""
        grads = [master.grad for master in masters if master.grad is not None]
        if not self._apart:
            self._total(grads)
        norm = nn.utils.get_total_norm(grads)
        if self._apart:
            square = norm**2
            self._total([square])
            norm = square.sqrt()
        bound = self._settings.clip * median(self._norms) if len(self._norms) >= _NORMS // 5 else math.inf
        nn.utils.clip_grads_with_norm_(masters, bound, norm)
        # A norm beyond the bound does not widen the next bound beyond measure.
        self._norms.append(min(float(norm), bound))
        return float(norm)

    def _logits(self, rows_BT: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._model(input_ids=rows_BT, use_cache=False).logits.float()
        return found

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the model's frozen weights and the rows.

        By names of what is trained: what workers have apart may be put together and divided again, see `merged`.
        """
        return {
            "step": self.step,
            "norms": list(self._norms),
            "masters": self.weights.state(),
            "optimiser": {
                name: {key: value.clone() for key, value in self._optimiser.state[master].items()}
                for name, master in self._named()
            },
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was put down. LearningError if it is of other experts."""
        self.weights.load(state["masters"])
        for name, master in self._named():
            self._optimiser.state[master] = {
                key: value.clone() for key, value in state["optimiser"][name].items()
            }
        self._norms = deque(state["norms"], maxlen=_NORMS)
        self.step = int(state["step"])

    def _named(self) -> Iterable[tuple[str, nn.Parameter]]:
        return zip(self.weights.state(), self.weights.masters.values(), strict=True)


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one training, the states of workers that have masters of their own each."""
    return {
        **states[0],
        **{
            what: {name: value for state in states for name, value in state[what].items()}
            for what in ("masters", "optimiser")
        },
    }


def rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of a step, counted from 0: it rises evenly, and falls as a cosine."""
    if step < settings.warm_steps:
        return settings.rate * (step + 1) / settings.warm_steps
    done = (step - settings.warm_steps) / max(1, settings.steps - settings.warm_steps)
    return settings.rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
