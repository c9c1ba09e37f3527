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
_START_S: Final = 240
_STARTS: Final = 3


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
    said = ""
    for _ in range(_STARTS):
        folder = Path(tempfile.mkdtemp(prefix="expertmesh-kube-"))
        atexit.register(_end, program, folder)
        try:
            ended = subprocess.run(
                [program, "start", folder], capture_output=True, text=True, timeout=_START_S, check=False
            )
        except subprocess.TimeoutExpired:
            said = f"not within {_START_S} s"
        else:
            if ended.returncode == 0:
                return Path(ended.stdout.strip().splitlines()[-1])
            said = ended.stderr
        # On a machine under load it may not be ready within the minute that the program gives it.
        _end(program, folder)
    raise AssertionError(f"the API server did not start: {said}")


def _end(program: Path, folder: Path) -> None:
    subprocess.run([program, "stop", folder], capture_output=True, timeout=60, check=False)
    shutil.rmtree(folder, ignore_errors=True)
