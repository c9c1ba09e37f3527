"""`expertmesh versions ...` over a tiny checkpoint and a store in a folder."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.checkpoint import Checkpoint
from cluster.versions.aliases import Move
from cluster.versions.store import Store
from tests.unit.cluster.versions import tiny
from workloads import cli

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name.startswith(("EXPERTMESH", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Servers that run on this machine are none of these tests' business.
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    found = tiny.base(tmp_path)
    (tmp_path / "expertmesh.yaml").write_text("model: {path: base}\nversions: {store: kept, history: 1}\n")
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "kept"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`expertmesh versions ...`: what it printed, on standard error if it failed as it should."""

    def call(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["expertmesh", "versions", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        assert int(ended.value.code or 0) == code, written.err
        return " ".join((written.err if code else written.out).split())

    return call


@pytest.fixture
def told(run: Run) -> Callable[..., Any]:
    """The same as JSON."""
    return lambda *arguments: json.loads(run(*arguments, "--json"))


def test_a_version_is_published_shown_and_collected(
    checkpoint: Checkpoint, store: Store, tmp_path: Path, run: Run, told: Callable[..., Any]
) -> None:
    base = told("publish")["digest"]
    tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1), (1, 2)])
    first = told("publish", "a.safetensors", "--reason", "better", "--metric", "loss=1.5", "--author", "me")
    assert first["changed"] == {"0": [1], "1": [2]} and first["new_blobs"] == 2
    store.aliases.move("production", Move(1, first["digest"], 0.0))
    gate = np.ones((tiny.EXPERTS, tiny.HIDDEN), np.float16)
    tiny.changes(checkpoint, tmp_path / "b.safetensors", [(0, 3)], **{tiny.GATE: gate})
    printed = run("publish", "b.safetensors")
    assert "1 experts and 1 tensors changed; 2 blobs new, 2 there before" in printed
    second = printed.split()[0]

    found = told("list")
    assert found["aliases"] == {"production": first["digest"]}
    assert [version["digest"] for version in found["versions"]] == [second, first["digest"], base]
    assert found["versions"][1] | {"created": 0} == {
        "digest": first["digest"],
        "aliases": ["production"],
        "parent": "",
        "created": 0,
        "author": "me",
        "reason": "better",
        "metrics": {"loss": 1.5},
        "experts": 2,
        "dense": 0,
        "error": "",
    }
    assert f"{first['digest'][:12]}" in run("list") and "production" in run("list")

    about = told("show", second[:10])
    assert about["parent"] == first["digest"], "made from what the alias points to"
    assert about["layers"].keys() == {"0", "1"} and about["layers"]["0"].keys() == {"1", "3"}
    assert about["tensors"].keys() == {tiny.GATE} and about["missing"] == [] and about["signature"] == "none"
    assert "metric loss 1.5" in run("show", "production")
    assert told("diff", second) == {
        "version": second,
        "against": first["digest"],
        "layers": {"0": [3]},
        "tensors": [tiny.GATE],
        "metrics": {"loss": [1.5, None]},
    }
    assert told("diff", second, base)["layers"] == {"0": [1, 3], "1": [2]}
    assert "(the base checkpoint)" in run("diff", "production") and "loss - → 1.5" in run(
        "diff", "production"
    )

    assert told("gc")["kept_manifests"] == 3, "nothing younger than a day goes"
    would = told("gc", "--min-age", "0s", "--dry-run")
    assert sorted(would["manifests"]) == sorted([base, second]) and len(store.manifests.all()) == 3
    assert f"2 versions, {len(would['blobs'])} blobs" in run("gc", "--min-age", "0s")
    assert store.manifests.all() == [first["digest"]]
    assert store.missing(store.manifests.get(first["digest"])) == ()


def test_a_damaged_version_does_not_hide_the_others(
    checkpoint: Checkpoint, tmp_path: Path, run: Run, told: Callable[..., Any]
) -> None:
    base = told("publish")["digest"]
    tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1)])
    bad = told("publish", "a.safetensors")["digest"]
    (tmp_path / "kept" / "manifests" / bad).write_bytes(b"{}")
    errors = {version["digest"]: version["error"] for version in told("list")["versions"]}
    assert errors == {base: "", bad: f"manifest {bad[:12]} of {tmp_path}/kept is damaged"}
    assert "is damaged" in run("list") and "is damaged" in run("show", bad, code=1)


def test_without_a_store_there_is_one_for_the_model(checkpoint: Checkpoint, tmp_path: Path, run: Run) -> None:
    (tmp_path / "expertmesh.yaml").write_text("model: {path: base}\n")
    assert "no version begins with 'production'" in run("show", "production", code=1)
    printed = run("publish")
    assert (tmp_path / ".cache/expertmesh/versions" / checkpoint.digest[:16] / "manifests").exists()
    assert printed.split()[0] in run("show", printed[:8])


def test_a_version_is_signed_and_its_signature_looked_at(
    checkpoint: Checkpoint, tmp_path: Path, run: Run, told: Callable[..., Any]
) -> None:
    key, other = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "key.pem").write_bytes(private)
    for name, signer in (("key.pub", key), ("other.pub", other)):
        public = signer.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (tmp_path / name).write_bytes(public)
    version = told("publish")["digest"]
    assert f"{version} is signed" == run("sign", version[:9], "--key", "key.pem")
    assert told("show", version)["signature"] == "unchecked"
    for name, words in (("key.pub", "good"), ("other.pub", "is not other.pub's")):
        (tmp_path / "expertmesh.yaml").write_text(
            f"model: {{path: base}}\nversions: {{store: kept, public_key: {name}}}\n"
        )
        assert words in told("show", version)["signature"]
    assert "can't sign" in run("sign", version, "--key", "key.pub", code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "ab"], "no version begins with 'ab'"),
        (["publish", "absent"], "no such file or folder"),
        (["publish", "base", "--parent", "ab"], "no version begins with 'ab'"),
        (["publish", "base", "--metric", "loss"], "--metric loss says no number"),
        (["publish", "--clone", "1-2"], "'1-2' names no expert"),
        (["publish", "--retire", "1:4"], "layer 1 has no expert 4"),
        (["list", "--store", "nowhere://x"], "nowhere://x can't be opened"),
        (["publish", "--model", "absent"], "absent"),
    ],
)
def test_a_mistake_is_one_message(checkpoint: Checkpoint, run: Run, arguments: list[str], words: str) -> None:
    said = run(*arguments, code=1)
    assert words in said and said.count("error:") == 1


def test_experts_are_cloned_and_retired(checkpoint: Checkpoint, run: Run) -> None:
    assert "2 experts and 1 tensors changed; 1 blobs new" in run(
        "publish", "--clone", "1:2", "--retire", "1:0"
    )
    digest = json.loads(run("list", "--json"))["versions"][0]["digest"]
    shown = run("show", digest)
    assert "1:4 beside 2" in shown and "experts retired" in shown and "1:0" in shown
    assert json.loads(run("show", digest, "--json"))["added"] == {"1": {"4": 2}}


def test_an_age_that_is_none_is_a_wrong_option(checkpoint: Checkpoint, run: Run) -> None:
    assert "--min-age" in run("gc", "--min-age", "soon", code=2)
