from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.config_admin import AdminConfig
from cluster.errors import ConfigError


def load(folder: Path, text: str) -> AdminConfig:
    file = folder / "given.yaml"
    file.write_text(text)
    return load_config(file, {}, {"KEY": "secret"}).config.admin


def test_without_a_word_there_is_none(tmp_path: Path) -> None:
    found = load(tmp_path, "admin:\n")
    assert found == AdminConfig() and (found.host, found.port, found.keys) == ("127.0.0.1", None, ())
    assert load(tmp_path, "admin: {host: 0.0.0.0}").port is None, "an address alone opens nothing"


def test_keys_are_read_as_the_server_s(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a\n\nb\n")
    text = f"admin: {{host: 0.0.0.0, port: 8001, keys: ['env:KEY', 'file:{tmp_path}/keys', plain]}}"
    found = load(tmp_path, text)
    assert [key.get_secret_value() for key in found.keys] == ["secret", "a", "b", "plain"]
    assert "secret" not in repr(found) and found.port == 8001


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("admin: {host: 0.0.0.0, port: 8001}", "admin.host: the admin API", "without a key"),
        ("admin: {port: 8000}", "admin.port: 8000", "is server.port as well"),
        ("admin: {port: 0}", "admin.port = 0", "greater than or equal to 1"),
        ("admin: {port: 8001, keys: ['env:ABSENT']}", "admin.keys", "env:ABSENT is unset or empty"),
        ("admin: {prot: 1}", "admin.prot", "did you mean admin.port?"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert key in str(error.value) and problem in str(error.value)
