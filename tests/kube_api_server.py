"""A real Kubernetes API server for tests, one per process, ended with it."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

import pytest

_SHARED: Final = Path(__file__).resolve().parents[2] / "shared" / "k8s"
CRDS: Final = _SHARED / "crds" / "for-apiserver-1.20"
"""KubeRay's, as far as that server reads them."""
_START_S: Final = 120


@pytest.fixture(scope="session")
def kube_api_server() -> Path:
    """An admin's kubeconfig. Skips where the server can't be had."""
    program = _SHARED / "apiserver"
    if not program.exists():
        pytest.skip("there is no ../shared/k8s/apiserver")
    for needed in ("etcd", "xz", "openssl"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed: apt-get install etcd-server xz-utils openssl")
    return _started(program)


@cache
def _started(program: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="expertmesh-kube-"))
    atexit.register(_end, program, folder)
    ended = subprocess.run(
        [program, "start", folder], capture_output=True, text=True, timeout=_START_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return Path(ended.stdout.strip().splitlines()[-1])


def _end(program: Path, folder: Path) -> None:
    subprocess.run([program, "stop", folder], capture_output=True, timeout=60, check=False)
    shutil.rmtree(folder, ignore_errors=True)
