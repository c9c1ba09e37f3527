"""Floating point operations of training, from the sizes of what is multiplied: 2 for each weight and token.

A forward pass takes 2 for each weight that a token meets; a backward pass 2 for what goes further back, and 2 for each
weight that is trained (Kaplan et al., "Scaling Laws for Neural Language Models", 2020). Attention over the context,
norms and the optimiser are left out: together they are a few hundredths at the lengths that are used here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Weights that are multiplied with a token."""

    met: int
    """By each token: attention, routers, the chosen experts, and the output's matrix."""


@dataclass
class Flops:
    """A running count."""

    size: ModelSize
    total: float = 0.0

    def forward(self, tokens: int) -> None:
        """A pass without gradients: counting choices, the version before, a teacher."""
        self.total += 2.0 * self.size.met * tokens

    def step(self, tokens: int, trained: float) -> None:
        """A pass with gradients, in which a token meets so many trained weights on average."""
        self.total += (4.0 * self.size.met + 2.0 * trained) * tokens
