"""expertmesh.json: where a made checkpoint comes from, how it was made, and the digests of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cluster.errors import CheckpointError
from workloads.models.progress import Progress

FILE_NAME: Final = "expertmesh.json"
# Raised when the same inputs begin to give other files; a cached model of another format is made again.
FORMAT: Final = 2


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of the checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """Content of expertmesh.json."""

    source: Mapping[str, str]
    """What it was made from: ``file`` and ``sha256``, and for a package ``package`` and ``version``."""
    seed: int
    experts: int
    top_k: int
    stored_dtype: str
    dtype: str
    """The dtype in which to serve the model."""
    dtype_reason: str = ""
    files: Mapping[str, FileDigest] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write expertmesh.json into ``folder``."""
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_provenance(folder: Path) -> Provenance | None:
    """What ``folder``'s expertmesh.json says, ``None`` without one; raises CheckpointError if unreadable."""
    path = folder / FILE_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        content["files"] = {name: FileDigest(**item) for name, item in content["files"].items()}
        return Provenance(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", "make the model again") from error


def digest_files(folder: Path, progress: Progress) -> dict[str, FileDigest]:
    """Size and sha256 of every file of ``folder`` but expertmesh.json itself."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != FILE_NAME)
    digests = {}
    for number, file in enumerate(files):
        progress("digests", number / len(files))
        digests[file.name] = FileDigest(file.stat().st_size, file_sha256(file))
    progress("digests", 1.0)
    return digests


def file_sha256(file: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sizes_agree(folder: Path, provenance: Provenance) -> bool:
    """Whether every file is there with its recorded size: a quick look, for every start."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == item.size
        for name, item in provenance.files.items()
    )
