from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import Config, load_config
from cluster.errors import ConfigError


def load(folder: Path, text: str) -> Config:
    file = folder / "given.yaml"
    file.write_text(text)
    return load_config(file, {}, {"KEY": "hush"}).config


def test_without_a_word_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = load(tmp_path, "log_level: info\n").learning
    assert not found.capture.on and found.retention == 30 * 86400
    assert found.url("0123456789abcdef" * 4) == f"{tmp_path}/expertmesh/stream/0123456789abcdef"


def test_keys_of_those_who_agreed(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "server: {api_keys: ['env:KEY', other]}\n"
        "learning: {stream: s3://b/s, capture: {keys: ['env:KEY'], consent: terms, share: 1}}\n",
    ).learning
    assert found.capture.on and found.url("m") == "s3://b/s" and found.capture.share == 1.0
    assert [key.get_secret_value() for key in found.capture.keys] == ["hush"]
    assert load(tmp_path, "learning: {capture: {without_key: true, consent: ours}}\n").learning.capture.on


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning: {capture: {without_key: true}}", "it is not said on what ground"),
        ("learning: {capture: {keys: [secret], consent: terms}}", "1 of 1 keys are none of server.api_keys"),
        (
            "server: {api_keys: [secret]}\nlearning: {capture: {without_key: true, consent: terms}}",
            "with server.api_keys every request has a key",
        ),
        ("learning: {capture: {share: 0}}", "learning.capture.share"),
        ("learning: {holdout: 1}", "learning.holdout"),
        ("learning: {drift: {every: soon}}", "learning.drift.every"),
        ("learning: {drift: {false_alarms: 0}}", "learning.drift.false_alarms"),
        ("learning: {bandit: {floor: 0.6}}", "learning.bandit.floor"),
        ("learning: {captured: {}}", "did you mean learning.capture?"),
    ],
)
def test_mistakes_say_what_is_wrong_and_no_secret(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text + "\n")
    assert words in str(caught.value) and "secret" not in str(caught.value)
