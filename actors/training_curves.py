"""What a training saw, as curves for TensorBoard."""

from __future__ import annotations

from dataclasses import asdict

from actors.expert_training import Trained


class Curves:
    """Of one training, which may have been begun before: what is of its step `step` or later is replaced."""

    def __init__(self, folder: str, step: int) -> None:
        """`folder`: for this training alone; what tensorboardX can write to."""
        from tensorboardX import SummaryWriter

        # Files are named by the second: one that was begun anew at once must not be overwritten.
        self._writer = SummaryWriter(folder, purge_step=step, filename_suffix=f".{step}")

    def add(self, trained: Trained, rate: float) -> None:
        """After a step; `rate`: at which it learnt."""
        seen = asdict(trained)
        step = seen.pop("step")
        for name, value in {**seen, "rate": rate}.items():
            self._writer.add_scalar(f"training/{name}", value, step)

    def close(self) -> None:
        """All is written then."""
        self._writer.close()
