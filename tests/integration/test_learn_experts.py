"""Which experts a domain is about: counted with the model itself, through the command."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from actors import trainable_version
from actors.text_routing import choices
from actors.trainable_version import open_encoder, open_version
from actors.version_comparison import bits_of
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from cluster.learning.judge import GateVerdict, judge
from cluster.learning.records import Record
from cluster.learning.stream import Stream
from cluster.versions.aliases import Move
from cluster.versions.growth import routers
from cluster.versions.manifest import Manifest
from cluster.versions.store import Store
from tests.tiny_dense import make_tiny_dense
from tests.tiny_models import make_tiny
from workloads import cli, learn_judging
from workloads.learn_run import held_out
from workloads.models.upcycle import upcycle

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "granitemoe"])
def test_every_choice_of_every_router_is_counted(arch: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny(arch, tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    counts = choices(model, [[1, 2, 3], [4, 5], []])
    assert list(counts) == [layer.index for layer in checkpoint.moe_layers]
    for layer in checkpoint.moe_layers:
        assert len(counts[layer.index]) == layer.num_experts
        assert sum(counts[layer.index]) == 5 * checkpoint.top_k
    assert choices(model, [[1, 2, 3]]) != counts, "hooks of before are gone"
    with pytest.raises(LearningError, match="Linear has no layers of experts"):
        choices(torch.nn.Linear(1, 1), [])


Run = Callable[..., str]
WORDS = {
    "law": ("the", "winter", "court", "heard", "long", "case", "and", "ruled", "for", "winter"),
    "code": ("river", "boat", "left", "early", "froze", "that", "day", "before", "river"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a stream of two domains."""
    folder = tmp_path_factory.mktemp("learn")
    upcycle(make_tiny_dense(folder / "dense"), folder / "model", dtype="float32")
    stream = Stream(str(folder / "stream"))
    for domain, words in WORDS.items():
        dice = random.Random(domain)
        texts = [f"{' '.join(dice.choices(words, k=24))} {number}" for number in range(120)]
        records = [Record("text", f"{domain}{n}", 1.0, domain=domain, answer=t) for n, t in enumerate(texts)]
        stream.append(records)
    (folder / "mesh.yaml").write_text(
        f"model: {{path: {folder}/model}}\n"
        f"learning: {{stream: {folder}/stream, state: {folder}/state, holdout: 0.2, known: [code], least: 40,\n"
        "  training: {workers: 0, gentle: false, steps: 40, length: 32, reach: 0.6, rate: 0.01}}\n"
        f"versions: {{store: {folder}/store}}\n"
    )
    return folder


@pytest.fixture
def run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    for name in os.environ:
        if name.startswith("EXPERTMESH"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    # No server of somebody else's is to be learnt beside.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def call(*arguments: str, code: int | None = 0) -> str:
        capsys.readouterr()
        words = ["expertmesh", "learn", *arguments, "--config", str(folder / "mesh.yaml")]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert code is None or (ended.value.code or 0) == code, said.err
        return said.out if code == 0 or "--json" in arguments else " ".join(said.err.split())

    return call


def test_the_command_says_which_experts_and_draws_them(run: Run, tmp_path: Path) -> None:
    few = ("--tokens", "300")
    found = json.loads(
        run("experts", "--domain", "law", "--against", "code", *few, "--json", "--png", "map.png")
    )
    assert found["against"] == ["code"] and found["tokens"] == [300, 300] and found["chosen"]
    for layer, counts in found["counts"].items():
        assert sum(counts) == 600 and len(counts) == 8 and layer in found["background"]
    for one in found["chosen"]:
        assert one["gain"] == pytest.approx(one["share"] - one["background"]) and one["gain"] > 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    shown = run("experts", "--domain", "law", *few, "--reach", "1")
    assert "to be cloned" in shown and "tokens of law" in " ".join(shown.split())
    assert "no domain 'physics'" in run("experts", "--domain", "physics", code=1)
    assert "no domain 'physics'" in run("run", "--domain", "physics", code=1)
    assert "compared with itself" in run("experts", "--domain", "law", "--against", "law", code=1)


def test_a_domain_is_learnt_and_published_if_nothing_is_forgotten(run: Run, folder: Path) -> None:
    made = json.loads(run("run", "--domain", "law", "--json"))
    metrics = made["metrics"]
    assert made["passed"] and made["reasons"] == [] and metrics["rise.law.high"] < 0
    assert metrics["bits_per_byte.law.after"] < metrics["bits_per_byte.law.before"]
    assert len(made["steps"]) == 40 and 0 < made["trained_share"] < 0.5
    manifest = Store(str(folder / "store")).manifests.get(made["manifest"])
    changed = [
        [layer, expert] for layer, experts in sorted(manifest.experts.items()) for expert in sorted(experts)
    ]
    assert changed == sorted(made["experts"]) and manifest.dense == {}
    assert manifest.metrics["rise.law"] == metrics["rise.law"] and manifest.reason == "learnt law"


def test_what_is_known_keeps_its_expert_and_a_copy_learns(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "grown"
    for name, value in (("CLONES", "2"), ("MOST", "1")):
        monkeypatch.setenv(f"EXPERTMESH__LEARNING__TRAINING__{name}", value)
    made = json.loads(run("run", "--domain", "law", "--seed", "3", "--store", str(store), "--json"))
    assert made["passed"] and made["clones"], made["reasons"]
    manifest = Store(str(store)).manifests.get(made["manifest"])
    added = sum(len(experts) for experts in manifest.added.values())
    assert added == len(made["clones"]) and len(manifest.dense) == len(manifest.added)
    assert all([layer, expert] in made["experts"] for layer, expert in made["clones"])
    for layer, expert in made["clones"]:
        assert expert not in manifest.experts.get(layer, {}), "the original is as it was"
    # What was judged is what the version computes.
    checkpoint = Checkpoint.open(folder / "model")
    model = open_version(checkpoint, Store(str(store)), made["manifest"])
    encode = open_encoder(checkpoint)
    held = held_out(Stream(str(folder / "stream")), 0.2)["law"]
    # A model of which so few texts are held out is judged by all of them.
    bits = sum(bits_of(model, encode(record.text)) for record in held)
    size = sum(len(record.text.encode()) for record in held)
    assert len(held) <= 48 and bits / size == pytest.approx(
        made["metrics"]["bits_per_byte.law.after"], abs=1e-4
    )
    # The version before serves on; with it as the parent the next round finds the added experts in place.
    Store(str(store)).aliases.move("production", Move(1, made["manifest"], 1.0, "me", "a test"))
    again = json.loads(
        run("run", "--domain", "law", "--seed", "4", "--store", str(store), "--json", code=None)
    )
    assert again["experts"] and len(again["steps"]) == 40


def test_routers_learn_in_a_review_and_are_judged_and_published(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "reviewed"
    monkeypatch.setenv("EXPERTMESH__LEARNING__TRAINING__REVIEW", "0.25")
    made = json.loads(run("run", "--domain", "law", "--seed", "3", "--store", str(store), "--json"))
    assert made["passed"] and [one["step"] for one in made["steps"]] == list(range(1, 41)), made["reasons"]
    manifest = Store(str(store)).manifests.get(made["manifest"])
    checkpoint = Checkpoint.open(folder / "model")
    assert set(manifest.dense) == set(routers(checkpoint)) and not manifest.added
    model, encode = open_version(checkpoint, Store(str(store)), made["manifest"]), open_encoder(checkpoint)
    held = held_out(Stream(str(folder / "stream")), 0.2)["law"]
    bits = sum(bits_of(model, encode(record.text)) for record in held)
    size = sum(len(record.text.encode()) for record in held)
    assert bits / size == pytest.approx(made["metrics"]["bits_per_byte.law.after"], abs=1e-4)


def test_what_the_gate_stops_is_not_published_and_says_why(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Store(str(folder / "store")).manifests.all()

    def stop(*args: Any, **more: Any) -> GateVerdict:
        return replace(judge(*args, **more), passed=False, reasons=("code: +3.00% bits per byte",))

    monkeypatch.setattr(learn_judging, "judge", stop)
    small = ("run", "--domain", "law", "--steps", "2")
    made = json.loads(run(*small, "--json", code=1))
    assert not made["passed"] and made["manifest"] == "" and made["reasons"] == ["code: +3.00% bits per byte"]
    assert Store(str(folder / "store")).manifests.all() == before


def test_too_little_to_judge_by_is_told_before_a_model_is_loaded(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable_version, "open_version", None)
    text = "a text of which there is one alone, and which is long enough"
    Stream(str(folder / "stream")).append([Record("text", "alone", 1.0, domain="alone", answer=text)])
    assert "0 held-out texts of alone say too little, 8 are asked for" in run(
        "run", "--domain", "alone", "--against", "law", code=1
    )


def test_the_loop_learns_what_is_new_once_and_from_what_serves(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    store = Store(str(folder / "store"))
    assert "round 1, " in (said := run("serve", "--until-idle", "--publish-only")) and "published" in said
    first = json.loads(run("status", "--json"))["rounds"][0]
    assert first["domain"] == "law" and first["phase"] == "published"
    assert store.manifests.get(first["manifest"]).parent == ""
    assert first["metrics"]["rise.law.high"] < 0 and "rise.code.high" in first["metrics"]
    assert run("serve", "--until-idle") == "", "nothing is learnt twice"
    store.aliases.move("production", Move(1, first["manifest"], 1.0))
    dice = random.Random(7)
    texts = [f"{' '.join(dice.choices(WORDS['law'], k=24))} more {number}" for number in range(120)]
    stream = Stream(str(folder / "stream"))
    stream.append([Record("text", t, 1.0, domain="law", answer=t) for t in texts])
    assert "round 2, " in run("serve", "--once")
    second = json.loads(run("status", "--json"))["rounds"][1]
    assert second["parent"] == first["manifest"] and second["part"] == 1
    assert "bits_per_byte.law before.after" in second["metrics"], "what was known of it is judged by itself"
    if second["manifest"]:
        assert store.manifests.get(second["manifest"]).parent == first["manifest"]
    assert not list((folder / "state" / "jobs").glob("*/*"))


def test_what_can_not_be_learnt_is_told_before_anything_begins(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileLock(folder / "state" / "lock"):
        assert "another `expertmesh learn serve` runs" in run("serve", "--once", code=1)
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
        assert "GiB too little" in run("serve", "--once", code=1)
        assert "GiB too little" in run("run", "--domain", "law", "--against", "code", code=1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1))
        assert "of disk at" in run("serve", "--once", code=1)
    foreign = Store(str(tmp_path / "foreign"))
    digest = foreign.manifests.put(Manifest("another model"))
    foreign.aliases.move("production", Move(1, digest, 1.0))
    elsewhere = ("--store", str(tmp_path / "foreign"))
    assert "is of another model" in run("serve", "--once", *elsewhere, code=1)
    assert "is of another model" in run("run", "--domain", "law", "--against", "code", *elsewhere, code=1)
    assert "no expertmesh server" in run("serve", "--once", "--url", "http://127.0.0.1:9", code=1)
