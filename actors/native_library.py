"""C++ of our own, compiled at its first use on a machine and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cluster.cache_folder import cache_folder
from cluster.errors import HostError

NATIVE: Final = Path(__file__).parent / "native"
_ALWAYS: Final = ("-std=c++17", "-shared", "-fPIC")
_COMPILE_S: Final = 120.0


def native_library(name: str, source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of a source file, from the cache or fresh. HostError where it can't be compiled."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    try:
        return ctypes.CDLL(str(_compiled(compiler, name, source, (*_ALWAYS, *flags))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise HostError(f"no C++ compiler for {source.name}: {said}", "install g++, or set CXX") from error


def _compiled(compiler: list[str], name: str, source: Path, flags: tuple[str, ...]) -> Path:
    """The library for this processor and compiler."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_S
    ).stdout
    sources = [path.read_bytes() for path in sorted(source.parent.iterdir()) if path.is_file()]
    identity = [*sources, version, " ".join(flags).encode(), processor().encode()]
    folder = cache_folder() / "kernels"
    library = folder / f"{name}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several hosts may compile at once: each its own file, and the last rename wins.
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            made = Path(fresh) / library.name
            command = [*compiler, *flags, str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=_COMPILE_S)
            made.replace(library)
    return library


def processor() -> str:
    """What -march=native looks at: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [
        line for line in lines if line.startswith(("model\t", "cpu family", "flags", "Features", "CPU part"))
    ]
    return " ".join([platform.machine(), *sorted(set(named))])
