"""`expertmesh bench serve`: the mesh beside stock vLLM with the experts in its own process.

Both servers run at once on the same cores with the same threads, and are asked in turn, so that a machine
whose speed drifts slows both alike; an idle server takes no core. Requests go over HTTP and stream.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from cluster.config import Config
from cluster.errors import ExpertmeshError
from workloads.bench.load import AllSeries, ask_in_turn, itl_ratio, named, rows, table, throughput_ratio
from workloads.bench.ports import free_port
from workloads.bench.report import Bar, envelope, now
from workloads.deploy import attention_arguments, engine_environment
from workloads.serve import Server, open_model, serving

Progress = Callable[[str, float], None]
_START_TIMEOUT_S = 900.0
_MIB = 2**20


def measure(config: Config, rounds: int, seed: int, output_tokens: int, progress: Progress) -> dict[str, Any]:
    """Start both servers, ask them in turn, return the report."""
    started_at = now()
    checkpoint, dtype, name = open_model(config, progress)
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(serving(config, progress))
        progress("starting stock vLLM", 0.5)
        arguments = {"dtype": dtype, **attention_arguments(checkpoint, dtype)}
        stock_url, stock_pid = stack.enter_context(_stock(config, checkpoint.path, name, arguments))
        urls = {"mesh": mesh.url, "stock": stock_url}
        series = ask_in_turn(
            urls,
            name,
            int(checkpoint.text_config["vocab_size"]),
            rounds=rounds,
            seed=seed,
            output_tokens=output_tokens,
            on_round=lambda over: progress("asking in turn", over / (rounds + 1)),
        )
        memory = _memory(mesh)
        memory["stock_rss_mb"] = _tree_rss(stock_pid)
    return _report(series, memory, mesh, started_at, seed, rounds)


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    console.print(table(report["results"]))
    for key, bar in report["bars"].items():
        console.print(f"{'met' if bar['met'] else 'missed'}  {key} {bar['value']:.3f} (bar {bar['limit']:g})")
    console.print(
        f"memory MiB: engine {report['engine_rss_mb']:.0f}, hosts {report['hosts_rss_mb']:.0f}, "
        f"stock {report['stock_rss_mb']:.0f}; ready after {report['ready_s']:.0f} s",
        highlight=False,
    )


@contextlib.contextmanager
def _stock(config: Config, path: Path, name: str, arguments: dict[str, str]) -> Iterator[tuple[str, int]]:
    """vLLM's own server with the experts in process, the same threads and limits; ended with the block."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path),
        "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port),
        "--max-num-seqs", str(config.engine.max_num_seqs),
        "--kv-cache-memory-bytes", str(int(config.engine.kv_cache)),
        "--distributed-executor-backend", "uni",
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    for key, value in arguments.items():
        command += [f"--{key.replace('_', '-')}", value]
    if config.engine.max_model_len is not None:
        command += ["--max-model-len", str(config.engine.max_model_len)]
    if config.engine.enforce_eager:
        command.append("--enforce-eager")
    # The same threads, and vLLM's own way of waiting: alone in its process it may spin between kernels.
    ours = engine_environment(config)
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    for key in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS",
                "TORCHINDUCTOR_CACHE_DIR", "HF_HUB_OFFLINE"):  # fmt: skip
        environment[key] = ours[key]
    # On CPUs vLLM 0.32 alone can't load what that saves, and would compile at every start.
    environment["VLLM_USE_AOT_COMPILE"] = "0"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            if process.poll() is not None:
                raise ExpertmeshError(f"stock vLLM ended with code {process.returncode}", " ".join(command))
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise ExpertmeshError("stock vLLM did not start in time")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        _, left = psutil.wait_procs([*family], timeout=20)
        for child in left:
            child.kill()
        if process.poll() is None:
            process.kill()
        process.wait()


def _report(
    series: AllSeries,
    memory: dict[str, float],
    mesh: Server,
    started_at: str,
    seed: int,
    rounds: int,
) -> dict[str, Any]:
    throughput, itl = throughput_ratio(series, "mesh", "stock"), itl_ratio(series, "mesh", "stock")
    return envelope(
        "bench serve",
        seed=seed,
        started_at=started_at,
        series=named(series),
        bars=[
            Bar("throughput_ratio", throughput, 0.95, at_most=False),
            Bar("itl_ratio", itl, 1.15, at_most=True),
            Bar("ready_s", mesh.breakdown.total, 90.0, at_most=True),
        ],
        throughput_ratio=throughput,
        itl_ratio=itl,
        ready_s=mesh.breakdown.total,
        start_breakdown_s=mesh.breakdown.seconds,
        rounds=rounds,
        dtype=mesh.blueprint.dtype,
        model=mesh.served_name,
        hosts=len(mesh.blueprint.deployment.hosts),
        planned_experts_mb=sum(mesh.blueprint.plan.bytes_by_host.values()) / _MIB,
        results=rows(series),
        **memory,
    )


def _memory(mesh: Server) -> dict[str, float]:
    """Resident MiB of the engine process and of all expert hosts."""
    import ray

    from actors import ray_controller

    stats = httpx.get(f"{mesh.url}/expertmesh/stats", timeout=30).json()
    controller = ray_controller.find(ray.get_runtime_context().namespace)
    reports = ray.get(controller.reports.remote(), timeout=60)
    return {
        "engine_rss_mb": stats["rss_bytes"] / _MIB,
        "hosts_rss_mb": sum(report.rss_bytes for report in reports.values()) / _MIB,
    }


def _tree_rss(pid: int) -> float:
    """Resident MiB of the largest process under `pid`: stock vLLM's engine, which holds the experts."""
    root = psutil.Process(pid)
    return max(process.memory_info().rss for process in [root, *root.children(recursive=True)]) / _MIB
