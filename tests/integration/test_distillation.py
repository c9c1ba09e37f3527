"""Learning from a teacher beside the text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.distillation import Distillation, TeacherSettings, open_teacher, soft_targets
from actors.expert_slices import ChosenExperts
from actors.expert_training import Training, TrainSettings
from actors.text_routing import expert_modules
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from tests.tiny_dense import make_tiny_dense
from workloads.models.upcycle import upcycle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student, and a teacher that is wider and not a mixture of experts."""
    folder = tmp_path_factory.mktemp("models")
    dense = make_tiny_dense(folder / "dense")
    student = upcycle(dense, folder / "student", dtype="float32")
    config = AutoModelForCausalLM.from_pretrained(student).config
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.2,
        )
    )
    teacher.save_pretrained(folder / "teacher")
    for file in student.glob("tokenizer*"):
        shutil.copy(file, folder / "teacher")
    return student, folder / "teacher"


def rows(step: int) -> torch.Tensor:
    return torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(step))


def apart(student: Any, teacher: Any) -> float:
    """KL from a teacher to a student on some of the rows that were learnt from."""
    with torch.inference_mode():
        return soft_targets(student(rows(3)).logits, teacher(rows(3)).logits, 1.0).item()


def learnt(path: Path, settings: TeacherSettings | None, checkpoint: Checkpoint) -> Any:
    student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    layers = [(layer, e) for layer, m in expert_modules(student).items() for e in range(m.num_experts)]
    chosen = ChosenExperts(student, layers)
    schedule = TrainSettings(20, 0.01, 2, beta=0.1)
    if settings is None:
        learner = Training(student, chosen, schedule)
        for step in range(20):
            learner.train(rows(step))
        return student
    taught = Distillation(student, open_teacher(settings, checkpoint), settings)
    with taught.watched():
        learner = Training(student, chosen, schedule, aside=taught)
        for step in range(20):
            learner.train(rows(step))
    assert taught() is None, "nothing is left of the last step"
    return student


def test_a_student_comes_nearer_to_its_teacher(folders: tuple[Path, Path]) -> None:
    student, teacher = folders
    checkpoint = Checkpoint.open(student)
    alone = learnt(student, None, checkpoint)
    settings = TeacherSettings(str(teacher), weight=20.0, temperature=1.0)
    guide = open_teacher(settings, checkpoint)
    assert apart(learnt(student, settings, checkpoint), guide) < 0.8 * apart(alone, guide)


def test_features_resemble_each_other_as_the_teacher_s_do(folders: tuple[Path, Path]) -> None:
    student, teacher = folders
    checkpoint = Checkpoint.open(student)
    settings = TeacherSettings(str(teacher), weight=0.0, features=50.0)
    guide = open_teacher(settings, checkpoint)

    def differ(model: Any) -> float:
        with torch.inference_mode():
            mine = model.base_model(rows(3)).last_hidden_state
            theirs = guide.base_model(rows(3)).last_hidden_state
        cosines = [(h := torch.nn.functional.normalize(x, dim=-1)) @ h.mT for x in (mine, theirs)]
        return torch.nn.functional.mse_loss(*cosines).item()

    assert differ(learnt(student, settings, checkpoint)) < differ(learnt(student, None, checkpoint))


def test_soft_targets_are_the_divergence_at_a_temperature() -> None:
    mine, theirs = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    one, other = (torch.softmax(x / 2, -1) for x in (theirs, mine))
    wanted = 4 * (one * (one / other).log()).sum(-1).mean()
    assert soft_targets(mine, theirs, 2.0).item() == pytest.approx(wanted.item(), rel=1e-5)
    padded = torch.cat((theirs, torch.randn(2, 3, 4)), -1)
    assert soft_targets(mine, padded, 2.0).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert soft_targets(mine, mine, 2.0).item() == pytest.approx(0.0, abs=1e-6)


def test_who_can_not_teach_is_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = folders
    checkpoint = Checkpoint.open(student)
    with pytest.raises(LearningError, match="holds no model to learn from"):
        open_teacher(TeacherSettings(str(tmp_path)), checkpoint)
    other = shutil.copytree(teacher, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(LearningError, match="another tokenizer"):
        open_teacher(TeacherSettings(str(other)), checkpoint)
    shutil.copy(teacher / "tokenizer.json", other / "tokenizer.json")
    (other / "model.safetensors").unlink()
    with pytest.raises(LearningError, match="can't be read as a model"):
        open_teacher(TeacherSettings(str(other)), checkpoint)
