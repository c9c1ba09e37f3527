from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.config_versions import VersionsConfig
from cluster.errors import ConfigError

MODEL = "0123456789abcdef" * 4


def load(folder: Path, text: str, environ: dict[str, str] | None = None) -> VersionsConfig:
    file = folder / "given.yaml"
    file.write_text(f"versions: {{{text}}}\n")
    return load_config(file, {}, environ or {}).config.versions


def test_without_a_word_each_model_has_a_store_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = load(tmp_path, "")
    assert found == VersionsConfig() and found.alias == "production" and found.running == "finish"
    assert (found.keep_warm, found.history, found.public_key) == (600.0, 10, None)
    assert found.url(MODEL) == f"{tmp_path}/expertmesh/versions/0123456789abcdef"


def test_what_the_file_and_the_environment_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {
        "EXPERTMESH__VERSIONS__OPTIONS__ANON": "false",
        "EXPERTMESH__VERSIONS__OPTIONS__CLIENT_KWARGS": "{region_name: eu}",
        "EXPERTMESH__VERSIONS__HISTORY": "3",
    }
    text = "store: s3://b/m, options: {endpoint_url: http://x}, alias: blue, keep_warm: 1h, running: continue"
    found = load(tmp_path, text, environ)
    assert found.url(MODEL) == "s3://b/m" and (found.alias, found.keep_warm) == ("blue", 3600.0)
    assert (found.running, found.history) == ("continue", 3)
    assert found.options == {
        "endpoint_url": "http://x",
        "anon": False,
        "client_kwargs": {"region_name": "eu"},
    }
    # Other processes have other folders.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert load(tmp_path, "store: kept").url(MODEL) == f"{tmp_path}/kept"
    assert load(tmp_path, "store: ~/kept").url(MODEL) == "/home/me/kept"


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("running: keep", "running = 'keep'", "allowed: finish, continue"),
        ("keep_warm: 0", "keep_warm = 0", "a duration above zero"),
        ("keep_warm: soon", "keep_warm = 'soon'", "should be a duration"),
        ("alias: Production", "alias = 'Production'", "lower-case letters, digits"),
        ("history: 0", "history = 0", "greater than or equal to 1"),
        ("spare_experts: -1", "spare_experts = -1", "greater than or equal to 0"),
        ("public_key: ''", "public_key = ''", "at least 1 character"),
        ("option: {}", "option", "did you mean versions.options?"),
    ],
)
def test_mistakes_say_which_key_and_what_is_wrong(tmp_path: Path, text: str, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert f"given.yaml:1: versions.{key}" in str(caught.value) and problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("no_replica: reroute", "placement.no_replica: reroute"),
        ("capacity: {policy: drop}", "placement.capacity.policy: drop"),
        ("capacity: {policy: reroute}", "placement.capacity.policy: reroute"),
    ],
)
def test_routers_that_grow_go_with_no_other_change_of_them(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(f"placement: {{{text}}}\nversions: {{spare_experts: 2}}\n")
    with pytest.raises(ConfigError, match=f"given.yaml:2: versions.spare_experts.*don't go with {key}"):
        load_config(file, {}, {})
    file.write_text("placement: {no_replica: drop}\nversions: {spare_experts: 2}\n")
    assert load_config(file, {}, {}).config.versions.spare_experts == 2


def test_options_are_not_shown_in_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"versions\.options") as caught:
        load(tmp_path, "options: hush")
    assert "hush" not in str(caught.value)
