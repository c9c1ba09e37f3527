"""Training of some of a model's weights: new text, old text beside it, and a pull towards the version before.

    loss = cross entropy of new and replayed rows + beta or hold * KL(version before | now)

Everything that the next step depends on is in `state`: taken up again it gives the same losses.

Shape suffixes: B = rows of a step, T = tokens of a row, V = vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
    beta: float = 0.05
    """Weight of the pull towards the version before, on new rows, where it is in the way of what is learnt."""
    hold: float = 1.0
    """The same on replayed rows."""
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
    risen: tuple[float, ...] = ()
    """By how much each row is worse than by the version before, nats per token; none where nothing pulls."""


class Training:
    """Of one model, in one process; several with a part of the rows each are one, if `total` adds up what they have."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Weights,
        settings: TrainSettings,
        *,
        aside: Callable[[], torch.Tensor | None] = lambda: None,
        total: Callable[[Sequence[torch.Tensor]], None] = lambda tensors: None,
    ) -> None:
        """`aside`: called after each forward pass, something to be added to the loss; `total`: adds to each tensor, in
        place, what the other workers have there.
        """
        self._model, self.weights, self._settings = model, chosen, settings
        self._aside, self._total = aside, total
        self._device = next(model.parameters()).device
        self.step = 0
        """Steps that were made."""
        self._norms: deque[float] = deque(maxlen=_NORMS)
        self._optimiser = torch.optim.AdamW(
            list(chosen.masters.values()),
            lr=settings.rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            # One pass over the weights rather than ten.
            fused=self._device.type == "cuda",
        )

    @property
    def pulls(self) -> bool:
        """Whether the version before is asked at each step."""
        return self._settings.beta > 0 or self._settings.hold > 0

    def train(self, rows_BT: torch.Tensor, part: float = 1.0, replayed: int = 0) -> Trained:
        """One step over rows of token numbers, the last `replayed` of what is known; they are this `part` of all
        workers' rows.

        LearningError if the loss is not a number: nothing is changed then.
        """
        settings, rows_BT = self._settings, rows_BT.to(self._device)
        before_BTV = None
        if self.pulls:
            with torch.no_grad(), self.weights.as_before():
                before_BTV = F.log_softmax(self._logits(rows_BT), dim=-1)
            # Of that pass nothing is to be heard.
            self._aside()
        now_BTV = F.log_softmax(self._logits(rows_BT), dim=-1)
        cross_entropy_B = _of_rows(now_BTV, rows_BT)
        cross_entropy, pull = cross_entropy_B.mean(), torch.zeros((), device=self._device)
        divergence, risen_B = pull, torch.zeros(0, device=self._device)
        if before_BTV is not None:
            by_row_B = F.kl_div(now_BTV, before_BTV, log_target=True, reduction="none").sum(dim=(1, 2))
            divergence_B = by_row_B / rows_BT.shape[1]
            divergence = divergence_B.mean()
            fresh = len(rows_BT) - replayed
            pull = settings.beta * divergence_B[:fresh].sum() + settings.hold * divergence_B[fresh:].sum()
            pull = pull / len(rows_BT)
            risen_B = cross_entropy_B.detach() - _of_rows(before_BTV, rows_BT)
        loss = cross_entropy + pull
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
        self._total([m.grad for m in self.weights.masters.values() if m.grad is not None])
        bound = settings.clip * median(self._norms) if len(self._norms) >= _NORMS // 5 else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.weights.masters.values(), bound))
        # A norm beyond the bound does not widen the next bound beyond measure.
        self._norms.append(min(norm, bound))
        for group in self._optimiser.param_groups:
            group["lr"] = rate(settings, self.step)
        self._optimiser.step()
        self.weights.write()
        self.step += 1
        summed, of_text, of_pull, *risen = torch.cat((seen, risen_B)).tolist()
        return Trained(self.step, summed, of_text, of_pull, norm, tuple(risen))

    def _logits(self, rows_BT: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._model(input_ids=rows_BT, use_cache=False).logits.float()
        return found

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the model's frozen weights and the rows."""
        return {
            "step": self.step,
            "norms": list(self._norms),
            "masters": self.weights.state(),
            "optimiser": self._optimiser.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was put down. LearningError if it is of other experts."""
        self.weights.load(state["masters"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._norms = deque(state["norms"], maxlen=_NORMS)
        self.step = int(state["step"])


def rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of a step, counted from 0: it rises evenly, and falls as a cosine."""
    if step < settings.warm_steps:
        return settings.rate * (step + 1) / settings.warm_steps
    done = (step - settings.warm_steps) / max(1, settings.steps - settings.warm_steps)
    return settings.rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def bits_of(model: nn.Module, tokens: Sequence[int]) -> float:
    """Bits that a model takes for a text, given as token numbers, after its first."""
    rows_1T = _row(model, tokens)
    with torch.inference_mode():
        logits_TV = model(input_ids=rows_1T, use_cache=False).logits[0, :-1].float()
        return F.cross_entropy(logits_TV, rows_1T[0, 1:], reduction="sum").item() / math.log(2)


def divergence(model: nn.Module, chosen: Weights, texts: Sequence[Sequence[int]]) -> float:
    """KL from the version before to what was learnt, nats per token of these texts. LearningError for none."""
    nats, count = 0.0, 0
    with torch.inference_mode():
        for tokens in texts:
            rows_1T = _row(model, tokens)
            with chosen.as_before():
                before_TV = F.log_softmax(model(input_ids=rows_1T, use_cache=False).logits[0].float(), dim=-1)
            now_TV = F.log_softmax(model(input_ids=rows_1T, use_cache=False).logits[0].float(), dim=-1)
            nats += F.kl_div(now_TV, before_TV, log_target=True, reduction="sum").item()
            count += len(tokens)
    if not count:
        raise LearningError("there is no text to be compared on", "give some of what is known")
    return nats / count


def _of_rows(logs_BTV: torch.Tensor, rows_BT: torch.Tensor) -> torch.Tensor:
    """[B] nats per token of each row, by logarithms of probabilities."""
    return -logs_BTV[:, :-1].gather(2, rows_BT[:, 1:, None])[..., 0].mean(dim=1)


def _row(model: nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], device=next(model.parameters()).device)
