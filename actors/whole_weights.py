"""Whole parameters of a model that are trained, with masters in float32: its routers, or all that it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from cluster.errors import LearningError


class WholeWeights:
    """Of one model; see `actors.expert_training.Weights`."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, remember: bool = True
    ) -> None:
        """`parameters`: by name, all else is frozen; `remember`: keep what was before, for `as_before`."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._held = dict(parameters)
        for parameter in self._held.values():
            parameter.requires_grad_(True)
        self.masters = {name: nn.Parameter(held.data.float().clone()) for name, held in self._held.items()}
        self._before = {name: held.data.clone() for name, held in self._held.items()} if remember else None
        self._all = sum(parameter.numel() for parameter in model.parameters())

    @property
    def share(self) -> float:
        """Of all the model's weights that are trained."""
        return sum(master.numel() for master in self.masters.values()) / self._all

    def take_gradients(self) -> None:
        """Give each master its gradient, and take the model's."""
        for name, held in self._held.items():
            self.masters[name].grad = None if held.grad is None else held.grad.float()
            held.grad = None

    def write(self) -> None:
        """Have the model compute with what the masters are now."""
        self._put({name: master.data for name, master in self.masters.items()})

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within the block the model computes as it did when this began. LearningError if that is not remembered."""
        if self._before is None:
            raise LearningError(
                "what the model was before is not remembered", "train without a pull towards it"
            )
        self._put(self._before)
        try:
            yield
        finally:
            self.write()

    def state(self) -> dict[str, torch.Tensor]:
        """The masters, to be put down."""
        return {name: master.data.clone() for name, master in self.masters.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the masters up again. LearningError if they are of other weights."""
        if state.keys() != self.masters.keys():
            raise LearningError("the checkpoint of the training is of other weights", "begin anew")
        for name, master in self.masters.items():
            master.data.copy_(state[name])
        self.write()

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._held[name].data.copy_(value)
