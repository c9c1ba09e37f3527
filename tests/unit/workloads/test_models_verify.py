"""Every kind of damage is found and named, and a whole model has none."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from tests.tiny_dense import make_tiny_dense
from tests.tiny_models import ARCHITECTURES, make_tiny
from workloads.models import upcycle as upcycle_module
from workloads.models.shard_writer import ShardWriter
from workloads.models.upcycle import upcycle
from workloads.models.verify import verify_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upcycled model of several shards."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(upcycle_module, "ShardWriter", lambda path: ShardWriter(path, 200_000))
        return upcycle(make_tiny_dense(folder / "dense"), folder / "moe")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def shards(model: Path) -> list[Path]:
    found = sorted(model.glob("*.safetensors"))
    assert len(found) > 2
    return found


def drop_digests(model: Path) -> None:
    (model / "expertmesh.json").unlink()


def change_tensor(file: Path, pick: str, value: torch.Tensor | None) -> str:
    """Replace (or drop, with ``None``) the first tensor whose name has ``pick``; returns its name."""
    tensors = load_file(file)
    name = next(name for name in tensors if pick in name)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def test_a_whole_model_has_no_problems(model: Path) -> None:
    stages: list[str] = []
    report = verify_model(model, progress=lambda stage, _: stages.append(stage))
    assert report.ok
    assert report.notes == ()
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert report.tensors == len(index["weight_map"])
    assert report.files == len(shards(model))
    assert list(dict.fromkeys(stages)) == ["headers", "digests", "values"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_published_names_of_every_architecture_are_expected(tmp_path: Path, arch: str) -> None:
    report = verify_model(make_tiny(arch, tmp_path / "model", max_shard_size="200KB"))
    assert report.problems == ()
    assert report.notes == ("digests not compared: there is no expertmesh.json",)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_torn_file_is_named_wherever_it_was_cut(model: Path, data: st.DataObject) -> None:
    (model / "expertmesh.json").unlink(missing_ok=True)
    victim = data.draw(st.sampled_from(shards(model)))
    content = victim.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    victim.write_bytes(content[:cut])
    problems = verify_model(model, deep=False).problems
    victim.write_bytes(content)
    assert len(problems) == 1
    assert problems[0].startswith(f"{victim.name} is torn ({cut} bytes)")


def test_all_problems_are_listed_at_once(model: Path) -> None:
    first, second, third, *_ = shards(model)
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    change_tensor(third, "w1", torch.full((96, 64), float("nan"), dtype=torch.bfloat16))
    report = verify_model(model)
    text = "\n".join(report.problems)
    assert f"{first.name} is torn" in text
    assert text.count(f"{second.name} is missing") == 1
    assert f"{third.name} has another sha256" in text
    assert f"{third.name} has NaN or infinite values" in text
    assert not report.ok


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_a_deep_check_reads_values(model: Path, value: float) -> None:
    drop_digests(model)
    name = change_tensor(shards(model)[1], "w2", torch.full((64, 96), value, dtype=torch.bfloat16))
    assert verify_model(model, deep=False).ok
    (problem,) = verify_model(model).problems
    assert name in problem


def test_a_changed_byte_is_found_by_its_digest(model: Path) -> None:
    victim = shards(model)[0]
    content = bytearray(victim.read_bytes())
    content[-2] ^= 1
    victim.write_bytes(content)
    assert verify_model(model, deep=False).ok
    assert verify_model(model).problems == (f"{victim.name} has another sha256 than expertmesh.json says",)


def test_a_lost_companion_is_found_by_expertmesh_json(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "LICENSE").write_text("")
    text = "\n".join(verify_model(model, deep=False).problems)
    assert "tokenizer.json is missing" in text
    assert "LICENSE has 0 bytes" in text


def test_shapes_must_be_those_of_the_configuration(model: Path) -> None:
    drop_digests(model)
    name = change_tensor(shards(model)[0], "q_proj", torch.zeros(64, 32, dtype=torch.bfloat16))
    (problem,) = verify_model(model).problems
    assert problem == f"shapes differ from config.json: {name} (64, 32) instead of (64, 64)"


def test_a_tensor_missing_from_its_file_and_from_the_index(model: Path) -> None:
    drop_digests(model)
    name = change_tensor(shards(model)[0], "q_proj", None)
    problems = verify_model(model).problems
    assert len(problems) == 2
    assert all(name in problem for problem in problems)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert verify_model(model).problems == (f"tensors missing by config.json: {name}",)


def test_many_tensors_make_one_problem(model: Path) -> None:
    drop_digests(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_local_experts": 16}))
    problems = verify_model(model).problems
    assert len(problems) == 2  # missing experts, and routers of another shape
    assert "and 43 more" in problems[0]  # 2 layers, 8 experts, 3 matrices, of which 5 are named


def test_files_that_are_no_safetensors(tmp_path: Path, model: Path) -> None:
    drop_digests(model)
    victim = shards(model)[0]
    victim.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert victim.name in verify_model(model).problems[0]
    (model / "model.safetensors.index.json").write_text("[]")
    assert any("index.json cannot be read" in problem for problem in verify_model(model).problems)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert any("no *.safetensors files" in problem for problem in verify_model(empty).problems)
    with pytest.raises(CheckpointError, match="no such folder"):
        verify_model(tmp_path / "nowhere")


def test_what_cannot_be_checked_is_said(model: Path) -> None:
    drop_digests(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "from_the_future"}))
    report = verify_model(model)
    assert report.ok
    assert any("'from_the_future'" in note for note in report.notes)
