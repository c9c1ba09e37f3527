"""The cluster's one secret: Ray's token, and the keys derived from it.

Ray takes its token from RAY_AUTH_TOKEN, else from the file that RAY_AUTH_TOKEN_PATH names, else from
~/.ray/auth_token; whoever has it can run code on every node. The data plane's key hangs on the same secret,
so there is one thing to distribute, to guard and to change.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cluster.errors import ConfigError

_TOKEN_BYTES: Final = 32
_DATA_PLANE: Final = "expertmesh data plane 1"


def token_path(configured: str | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the token's file is: the configured place (``ray.token_path``), else where Ray looks."""
    named = configured or environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"


def ray_environment(path: Path) -> dict[str, str]:
    """Environment variables under which every Ray process of the cluster asks for the token of this file."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def ensure_token(path: Path) -> str:
    """The token in ``path``, made first (mode 0600, 256 random bits) if the file does not exist.

    Several processes may call this at once: all get the same token. Raises ConfigError if the file can be
    read by other users, is empty, or cannot be read or written.
    """
    try:
        return read_token(path)
    except FileNotFoundError:
        pass
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(_TOKEN_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            # A link, not a rename: it fails where another process was first, whose token then counts.
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    except OSError as error:
        raise ConfigError(
            f"the cluster token cannot be written to {path}: {error.strerror}",
            "set ray.token_path to a file in a folder of yours",
        ) from error
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in ``path``; FileNotFoundError if there is none, ConfigError if it is open to others."""
    try:
        with path.open() as stream:
            # Asked of the open file, so that what is checked is what is read.
            status = os.fstat(stream.fileno())
            token = stream.read().strip()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(
            f"the cluster token {path} cannot be read: {reason}", "give its file to the user that runs this"
        ) from error
    # A secret that Kubernetes mounts belongs to root and reaches a pod's user through its group.
    mounted = status.st_uid == 0 != os.geteuid()
    forbidden = stat.S_IRWXO | stat.S_IWGRP if mounted else stat.S_IRWXO | stat.S_IRWXG
    if status.st_mode & forbidden:
        raise ConfigError(
            f"the cluster token {path} is open to other users (mode {stat.S_IMODE(status.st_mode):04o})",
            f"run: chmod 600 {path}",
        )
    if not token:
        raise ConfigError(f"the cluster token {path} is empty", "remove the file, and a new one is made")
    return token


def derive(token: str, purpose: str) -> bytes:
    """A 32-byte key for one purpose: HMAC-SHA256 of the purpose under the token (RFC 2104)."""
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).digest()


def data_plane_key(environ: Mapping[str, str] = os.environ) -> bytes:
    """The data plane's key on this node, from the token that Ray uses here.

    Raises ConfigError if this node has no token: a key is never made up, for no other node would have it.
    """
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return derive(token, _DATA_PLANE)
    path = token_path(environ=environ)
    try:
        return derive(read_token(path), _DATA_PLANE)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no cluster token on this node: {path} does not exist",
            "copy the head node's token file there, or name it with RAY_AUTH_TOKEN_PATH",
        ) from None
