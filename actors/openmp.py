"""Which OpenMP runtime the computing processes run on.

Engine and hosts alternate on the same cores within every layer. GNU's runtime lets a waiting thread either
spin, which takes the core from whoever computes next, or sleep, so that every parallel region begins with
waking it up. Intel's (LLVM's) yields the core while it waits and sleeps after a while, which suits both:
measured with the default model on two cores, a step took about 1.2 and 1.08 times as long as stock vLLM's at
concurrency 1 and 16, against 1.3 and 1.13 with the best setting of GNU's and 1.8 and 1.7 with sleeping.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import structlog

log = structlog.get_logger()


@cache
def library() -> Path | None:
    """Intel's OpenMP runtime, from the package `intel-openmp`; None where there is none (other processors)."""
    try:
        named = [file for file in files("intel-openmp") or () if file.name == "libiomp5.so"]
    except PackageNotFoundError:
        return None
    return next((Path(file.locate()).resolve() for file in named if Path(file.locate()).exists()), None)


def load() -> None:
    """Use it in this process; to be called before torch is imported, which brings GNU's."""
    path = library()
    if path is None:
        return
    try:
        # Global, so that torch's and vLLM's libraries find its functions before those of their own runtime.
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        log.warning("OpenMP runtime not loaded, GNU's is used", reason=str(error))
        return
    remove_registration()


def preload(environment: dict[str, str] | os._Environ[str]) -> None:
    """Have processes started with `environment` use it. vLLM otherwise preloads GNU's."""
    path = library()
    if path is not None and "libiomp" not in environment.get("LD_PRELOAD", ""):
        environment["LD_PRELOAD"] = ":".join(filter(None, [str(path), environment.get("LD_PRELOAD", "")]))


def remove_registration() -> None:
    """Take away what Intel's runtime keeps of this process in /dev/shm; does nothing under another runtime.

    It is there to find a second runtime in the same process. Removed at exit only, it would outlive every
    process that is killed.
    """
    with contextlib.suppress(AttributeError):
        # The runtime starts, and registers, at its first use.
        ctypes.CDLL(None).omp_get_max_threads()
    remove_registration_of(os.getpid())


def remove_registration_of(pid: int) -> None:
    """The same of another process of this user's, once it has been killed."""
    Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}").unlink(missing_ok=True)
