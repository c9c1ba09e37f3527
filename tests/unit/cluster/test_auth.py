from __future__ import annotations

import hmac
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.auth import data_plane_key, derive, ensure_token, ray_environment, read_token, token_path
from cluster.errors import ConfigError


def test_a_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "auth_token"
    token = ensure_token(path)
    assert len(bytes.fromhex(token)) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert ensure_token(path) == read_token(path) == token
    assert ensure_token(tmp_path / "other") != token
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ensure_token(tmp_path / "auth_token")
    finally:
        os.umask(before)
    assert (tmp_path / "auth_token").stat().st_mode & 0o777 == 0o600


def test_many_at_once_get_the_same_token(tmp_path: Path) -> None:
    found: list[str] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        found.append(ensure_token(tmp_path / "auth_token"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602, 0o604])
def test_a_token_open_to_others_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "auth_token"
    ensure_token(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"open to other users .mode {mode:04o}") as caught:
        ensure_token(path)
    assert caught.value.hint == f"run: chmod 600 {path}"
    subprocess.run(caught.value.hint.removeprefix("run: ").split(), check=True)
    ensure_token(path)


def test_an_empty_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "auth_token"
    path.touch(mode=0o600)
    with pytest.raises(ConfigError, match="is empty"):
        ensure_token(path)


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        ensure_token(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be (read|written)"):
        ensure_token(tmp_path / "file" / "auth_token")


def test_where_the_token_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"RAY_AUTH_TOKEN_PATH": "/named"}
    assert token_path("~/mine", environ) == tmp_path / "mine"
    assert token_path(None, environ) == Path("/named")
    assert token_path(None, {}) == tmp_path / ".ray" / "auth_token"
    assert ray_environment(Path("/x")) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/x"}


def test_derived_keys_differ_by_token_and_purpose() -> None:
    key = derive("token", "purpose")
    assert key == hmac.digest(b"token", b"purpose", "sha256")
    assert len({key, derive("token", "other"), derive("other", "purpose")}) == 3


def test_the_data_planes_key_follows_rays_order_of_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = ensure_token(tmp_path / ".ray" / "auth_token")
    named = ensure_token(tmp_path / "named")
    of_home, of_named = data_plane_key({}), data_plane_key({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")})
    both = {"RAY_AUTH_TOKEN": f" {home}\n", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert data_plane_key(both) == of_home != of_named
    assert home != named and home.encode() not in (of_home, of_named)


def test_a_node_without_a_token_makes_none_up(tmp_path: Path) -> None:
    path = tmp_path / "auth_token"
    with pytest.raises(ConfigError, match="no cluster token on this node"):
        data_plane_key({"RAY_AUTH_TOKEN_PATH": str(path)})
    assert not path.exists()


def test_the_key_is_the_same_in_every_process(tmp_path: Path) -> None:
    ensure_token(tmp_path / "auth_token")
    environ = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "auth_token")}
    code = "from cluster.auth import data_plane_key; print(data_plane_key().hex())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == data_plane_key(environ).hex()
