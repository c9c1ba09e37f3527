"""A small file per running `expertmesh serve`, so that `status`, `chat` and `down` find it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.errors import ExpertmeshError


@dataclass(frozen=True, slots=True)
class Run:
    """A server that runs on this machine."""

    pid: int
    started: float
    """Creation time of the process, so that a reused pid is not taken for it."""
    url: str
    served_name: str
    ray_address: str
    namespace: str
    token_path: str


def run_directory() -> Path:
    """Folder of the run files, private to the user."""
    base = (
        os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    )
    return Path(base) / "expertmesh" / "run"


def write(run: Run) -> Path:
    """Announce `run`; the caller removes the file when it ends."""
    folder = run_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{run.pid}.json"
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(asdict(run)))
    fresh.replace(path)
    return path


def running() -> list[Run]:
    """Every server of this user that still lives, oldest first; files of dead ones are removed."""
    runs = []
    for path in run_directory().glob("*.json"):
        try:
            run = Run(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            path.unlink(missing_ok=True)
            continue
        if alive(run):
            runs.append(run)
        else:
            path.unlink(missing_ok=True)
    return sorted(runs, key=lambda run: run.started)


def alive(run: Run) -> bool:
    """Whether the very process that wrote `run` still runs."""
    try:
        process = psutil.Process(run.pid)
        return abs(process.create_time() - run.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def the_one(url: str | None = None) -> Run:
    """The server meant: the one at `url`, else the only one that runs. ExpertmeshError if it isn't clear."""
    runs = [run for run in running() if url is None or run.url == url.rstrip("/")]
    if not runs:
        raise ExpertmeshError(
            "no expertmesh server of yours runs on this machine" + (f" at {url}" if url else ""),
            "start one with `expertmesh serve`",
        )
    if len(runs) > 1:
        raise ExpertmeshError(
            f"several servers run: {', '.join(run.url for run in runs)}", "say which one with --url"
        )
    return runs[0]
