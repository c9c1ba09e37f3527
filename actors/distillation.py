"""Learning from a larger model as well: its soft targets, and how the features of a row's tokens resemble each other.

    loss = weight * T^2 * KL(teacher / T | student / T) + features * |cosines of the teacher's - of the student's|^2

The first is of Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. The second compares hidden states
through their cosines within a row (Park et al., "Relational Knowledge Distillation", 2019), so that the teacher may be
wider than the student, and no projection has to be learnt that nobody serves.

Shape suffixes: B = rows of a step, T = tokens of a row, V = vocabulary, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """From whom, and how much."""

    folder: str
    """Of a checkpoint in Hugging Face's layout, a mixture of experts or not, with the same tokenizer."""
    weight: float = 1.0
    temperature: float = 2.0
    features: float = 0.0


def open_teacher(settings: TeacherSettings, checkpoint: Checkpoint, device: str = "cpu") -> Any:
    """The teacher of a model. LearningError if it can't be read, or reads text as other tokens than the model does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(settings.folder)
    if not (folder / "config.json").is_file():
        raise LearningError(
            f"{folder} holds no model to learn from", "name a folder with config.json and weights"
        )
    try:
        words, other = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (checkpoint.path, folder))
        if words != other:
            raise LearningError(
                f"{folder} has another tokenizer than {checkpoint.path}",
                "a teacher of the same family is expected",
            )
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise LearningError(
            f"{folder} can't be read as a model: {str(error).splitlines()[0]}", "look at its files"
        ) from error
    return model.to(device).eval().requires_grad_(False)


class Distillation:
    """What is added to the loss of a student: see `actors.expert_training.Training`, `aside`."""

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: TeacherSettings) -> None:
        self._student, self._teacher, self._settings = student, teacher, settings
        self._loss: torch.Tensor | None = None
        self._hidden_BTH: torch.Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block the student's forward passes are listened to."""
        base: Any = self._student.base_model
        hooks = [
            base.register_forward_hook(self._hear_hidden),
            self._student.register_forward_hook(self._hear_logits, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self) -> torch.Tensor | None:
        """Of the last forward pass, which is forgotten; None if nothing was to be learnt in it."""
        loss, self._loss, self._hidden_BTH = self._loss, None, None
        return loss

    def _hear_hidden(self, _: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._hidden_BTH = output.last_hidden_state

    def _hear_logits(self, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            taught = self._teacher(
                input_ids=kwargs["input_ids"],
                use_cache=False,
                output_hidden_states=self._settings.features > 0,
            )
        loss = self._settings.weight * soft_targets(output.logits, taught.logits, self._settings.temperature)
        if self._settings.features:
            assert self._hidden_BTH is not None
            alike = F.mse_loss(_cosines(self._hidden_BTH), _cosines(taught.hidden_states[-1]))
            loss = loss + self._settings.features * alike
        self._loss = loss


def soft_targets(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 times the KL divergence from the teacher to the student at a temperature T, nats per token.

    Where one has a few words more, none of which is in any text, they are left out.
    """
    size = min(student_BTV.shape[-1], teacher_BTV.shape[-1])
    now, wanted = (
        F.log_softmax(logits[..., :size].float().flatten(0, 1) / temperature, dim=-1)
        for logits in (student_BTV, teacher_BTV)
    )
    found: torch.Tensor = F.kl_div(now, wanted, log_target=True, reduction="batchmean")
    return temperature**2 * found


def _cosines(hidden_BTH: torch.Tensor) -> torch.Tensor:
    """[B, T, T]: of every pair of tokens of a row."""
    unit_BTH = F.normalize(hidden_BTH.float(), dim=-1)
    return unit_BTH @ unit_BTH.transpose(1, 2)
