"""`expertmesh bench serve`: the mesh beside stock vLLM with the experts in its own process.

Both servers run at once on the same cores with the same threads, and are asked in turn, so that a machine
whose speed drifts slows both alike; an idle server takes no core. Requests go over HTTP and stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from cluster.config import Config
from cluster.errors import ExpertmeshError
from workloads.bench.report import Bar, envelope, now, quantiles
from workloads.deploy import attention_arguments, engine_environment
from workloads.serve import Server, open_model, serving

Progress = Callable[[str, float], None]
_START_TIMEOUT_S = 900.0
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Load:
    """What one block sends: `concurrency` prompts at once of random tokens, as many rounds of it as asked."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int


@dataclass
class Series:
    """What one server did at one concurrency: tokens per second per block, milliseconds between tokens."""

    tokens_per_s: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)


def measure(config: Config, rounds: int, seed: int, output_tokens: int, progress: Progress) -> dict[str, Any]:
    """Start both servers, ask them in turn, return the report."""
    started_at = now()
    checkpoint, dtype, name = open_model(config, progress)
    loads = [Load(1, 32, output_tokens), Load(16, 32, output_tokens)]
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(serving(config, progress))
        progress("starting stock vLLM", 0.5)
        arguments = {"dtype": dtype, **attention_arguments(checkpoint, dtype)}
        stock_url, stock_pid = stack.enter_context(_stock(config, checkpoint.path, name, arguments))
        urls = {"mesh": mesh.url, "stock": stock_url}
        series = {(who, load.concurrency): Series() for who in urls for load in loads}
        generator = random.Random(seed)
        vocabulary = int(checkpoint.text_config["vocab_size"])
        for number in range(-1, rounds):
            for load in loads:
                prompts = _prompts(generator, load, vocabulary)
                # Turns begin with one and the other, so that neither always runs on the warmer machine.
                order = ["mesh", "stock"] if number % 2 else ["stock", "mesh"]
                for who in order:
                    block = asyncio.run(_block(urls[who], name, prompts, load))
                    if number >= 0:  # the first turn warms up
                        _add(series[who, load.concurrency], block, load)
            progress("asking in turn", (number + 2) / (rounds + 1))
        memory = _memory(mesh)
        memory["stock_rss_mb"] = _tree_rss(stock_pid)
    return _report(series, memory, mesh, started_at, seed, rounds)


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    table = Table(
        "server", "concurrency", "tokens/s p50", "between tokens ms p50", "p99", "first token ms p50"
    )
    for row in report["results"]:
        table.add_row(
            row["server"],
            str(row["concurrency"]),
            f"{row['tokens_per_s_p50']:.1f}",
            f"{row['itl_ms_p50']:.1f}",
            f"{row['itl_ms_p99']:.1f}",
            f"{row['ttft_ms_p50']:.0f}",
        )
    console.print(table)
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
    port = _free_port()
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
    for key in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_AOT_COMPILE",
                "VLLM_NO_USAGE_STATS", "TORCHINDUCTOR_CACHE_DIR", "HF_HUB_OFFLINE"):  # fmt: skip
        environment[key] = ours[key]
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


async def _block(
    url: str, name: str, prompts: list[list[int]], load: Load
) -> tuple[float, list[list[float]]]:
    """One turn: all prompts at once. Returns its seconds and per request the times of its tokens."""

    async def request(client: httpx.AsyncClient, prompt: list[int]) -> list[float]:
        body = {
            "model": name,
            "prompt": prompt,
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        times = [time.perf_counter()]
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        return times

    async with httpx.AsyncClient(timeout=600) as client:
        begin = time.perf_counter()
        times = await asyncio.gather(*(request(client, prompt) for prompt in prompts))
        return time.perf_counter() - begin, list(times)


def _add(series: Series, block: tuple[float, list[list[float]]], load: Load) -> None:
    seconds, times = block
    series.tokens_per_s.append(load.concurrency * load.output_tokens / seconds)
    for request in times:
        series.ttft_ms.append((request[1] - request[0]) * 1e3)
        series.itl_ms.extend((b - a) * 1e3 for a, b in itertools.pairwise(request[1:]))


def _report(
    series: dict[tuple[str, int], Series],
    memory: dict[str, float],
    mesh: Server,
    started_at: str,
    seed: int,
    rounds: int,
) -> dict[str, Any]:
    # Ratios are taken turn by turn, their median reported: turns beside each other saw the same machine.
    pairs = zip(series["mesh", 16].tokens_per_s, series["stock", 16].tokens_per_s, strict=True)
    throughput = quantiles([ours / stock for ours, stock in pairs]).p50
    itl = quantiles(series["mesh", 1].itl_ms).p50 / quantiles(series["stock", 1].itl_ms).p50
    rows = []
    for (who, concurrency), one in series.items():
        itl_ms = quantiles(one.itl_ms)
        rows.append(
            {
                "server": who,
                "concurrency": concurrency,
                "tokens_per_s_p50": quantiles(one.tokens_per_s).p50,
                "itl_ms_p50": itl_ms.p50,
                "itl_ms_p99": itl_ms.p99,
                "ttft_ms_p50": quantiles(one.ttft_ms).p50,
            }
        )
    named = {}
    for (who, concurrency), one in series.items():
        for key in ("tokens_per_s", "itl_ms", "ttft_ms"):
            named[f"{who}_{concurrency}_{key}"] = getattr(one, key)
    return envelope(
        "bench serve",
        seed=seed,
        started_at=started_at,
        series=named,
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
        expert_weights_mb=sum(mesh.blueprint.plan.bytes_by_host.values()) / _MIB,
        results=rows,
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


def _prompts(generator: random.Random, load: Load, vocabulary: int) -> list[list[int]]:
    low, high = min(100, vocabulary // 2), vocabulary - 1
    return [
        [generator.randint(low, high) for _ in range(load.prompt_tokens)] for _ in range(load.concurrency)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
