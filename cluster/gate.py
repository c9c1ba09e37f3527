"""What a model's gate makes of its logits: which expert it takes before which, and the weights of those it takes.

Shape suffixes: R = rows, E = experts, K = top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEVER = -np.inf
# Masked logits (`actors.reroute`) are the lowest number of their type, and no model's own come near.
_MASKED = -1e30


@dataclass(frozen=True, eq=False)
class Gate:
    """How one layer chooses, as in DeepSeek-V3 (arXiv:2412.19437) in its most general form."""

    scoring: str = "softmax"
    """softmax or sigmoid."""
    renormalize: bool = True
    """Whether a row's weights are scaled to a fixed sum."""
    bias: np.ndarray | None = None
    """float32 [E], added to the scores for the choice alone."""
    groups: int = 1
    top_groups: int = 1
    """A row chooses among the experts of its best groups only."""

    def scores(self, logits_RE: np.ndarray) -> np.ndarray:
        """float32 [R, E]: what weights are proportional to."""
        logits = logits_RE.astype(np.float32)
        if self.scoring == "sigmoid":
            return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def preferences(self, logits_RE: np.ndarray) -> np.ndarray:
        """float32 [R, E]: the higher, the sooner an expert is chosen; NEVER for one that can't be.

        Without a bias these are the logits themselves: in their order, and without ties of scores that vanish.
        """
        values = logits_RE.astype(np.float32) if self.bias is None else self.scores(logits_RE) + self.bias
        # Not `<=`: NaN is to be refused as well.
        values = np.where(logits_RE > _MASKED, values, NEVER)
        if self.groups > 1:
            rows = len(values)
            by_group = values.reshape(rows, self.groups, -1)
            # With a bias the two best of a group speak for it, else the best.
            best = np.sort(by_group, axis=2)[:, :, -(1 if self.bias is None else 2) :].sum(axis=2)
            order = np.argsort(-best, axis=1, kind="stable")[:, self.top_groups :]
            np.put_along_axis(by_group, order[:, :, None], NEVER, axis=1)
            values = by_group.reshape(rows, -1)
        return values

    def reweigh(
        self, logits_RE: np.ndarray, weights_RK: np.ndarray, old_RK: np.ndarray, new_RK: np.ndarray
    ) -> np.ndarray:
        """float32 [R, K]: what the gate itself gives the new experts; `weights_RK` are those of the old ones.

        Weights are the scores times a factor, which is read off each row's old weights. A gate that normalises
        keeps their sum.
        """
        scores = np.maximum(self.scores(logits_RE), np.finfo(np.float32).tiny)
        old, new = (np.take_along_axis(scores, ids, axis=1) for ids in (old_RK, new_RK))
        factor = weights_RK.sum(axis=1) / (new if self.renormalize else old).sum(axis=1)
        return (new * factor[:, None]).astype(np.float32)
