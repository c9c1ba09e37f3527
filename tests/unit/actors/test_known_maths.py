"""What is known of a model's experts is found out once, and again where it was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors import expert_maths, known_maths
from actors.expert_maths import layer_maths
from cluster.checkpoint import Checkpoint
from tests.tiny_models import make_tiny


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(known_maths, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(make_tiny("mixtral", tmp_path / "model"))


def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are built from here on."""
    built: list[str] = []
    plain = expert_maths._experts_modules.__wrapped__

    def counted(path: str, digest: str) -> Any:
        built.append(path)
        return plain(path, digest)

    monkeypatch.setattr(expert_maths, "_experts_modules", counted)
    return built


def test_a_second_host_builds_no_model(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = builds(monkeypatch)
    first = [layer_maths(checkpoint, layer) for layer in (0, 1)]
    assert len(built) == 2
    second = [layer_maths(checkpoint, layer) for layer in (0, 1)]
    assert second == first and len(built) == 2
    assert second[1].module.down_proj.shape == first[1].module.down_proj.shape  # built when it is wanted


@pytest.mark.parametrize("text", ["", "[]", "{", '{"0": 7}', '{"0": {"hidden": 1}}', '{"zero": {}}'])
def test_a_damaged_file_is_made_again(
    text: str, checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = layer_maths(checkpoint, 0)
    (file,) = (cache / "maths").iterdir()
    file.write_text(text)
    built = builds(monkeypatch)
    assert layer_maths(checkpoint, 0) == expected and len(built) == 1
    assert layer_maths(checkpoint, 0) == expected and len(built) == 1


def test_another_transformers_is_asked_itself(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer_maths(checkpoint, 0)
    monkeypatch.setattr(known_maths, "_transformers", lambda: "99.0")
    built = builds(monkeypatch)
    layer_maths(checkpoint, 0)
    assert len(built) == 1


def test_a_cache_that_can_t_be_written_is_done_without(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    assert layer_maths(checkpoint, 0) == layer_maths(checkpoint, 0)
