"""A vLLM engine on a GPU in this process, stock or of a mesh, and how fast it answers."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from workloads.bench.gpu_mesh import GpuMesh

ENVIRONMENT: Final[Mapping[str, str]] = {
    # One process: the engine's steps can be watched, and it is the engine's own loop that is timed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Multicast may put the GPUs of a host that others share out of service.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "HF_HUB_OFFLINE": "1",
}
PROMPT, ANSWER = 128, 128


def engine(model: Path, dtype: str, mesh: GpuMesh | None, **more: Any) -> Any:
    """vLLM over the checkpoint; its experts are the mesh's where one is given."""
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 256,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        **more,
    }
    if mesh is not None:
        from actors.engine_plugin import ENABLED, LOAD_FORMAT, environment, register

        register()
        os.environ.update(environment(mesh.settings(), mesh.key))
        arguments |= {
            "load_format": LOAD_FORMAT,
            "worker_extension_cls": "actors.engine_plugin.WorkerExtension",
            "additional_config": ENABLED,
        }
    from vllm import LLM

    return LLM(str(model), **arguments)


def prompts(count: int, vocabulary: int, length: int = PROMPT, seed: int = 7) -> list[list[int]]:
    """Random token ids, the same in every run."""
    generator = random.Random(seed)
    return [[generator.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def answers(
    llm: Any,
    inputs: list[list[int]],
    tokens: int = ANSWER,
    each_step: Callable[[float], None] = lambda seconds: None,
) -> tuple[list[list[int]], float]:
    """Greedy tokens of all prompts at once, and the seconds. `each_step` is told the time of every step so far."""
    from vllm import SamplingParams

    core = llm.llm_engine
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    for number, ids in enumerate(inputs):
        core.add_request(str(number), {"prompt_token_ids": ids}, greedy)
    said: dict[int, list[int]] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                said[int(output.request_id.partition("-")[0])] = list(output.outputs[0].token_ids)
        each_step(time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return [said.get(number, []) for number in range(len(inputs))], seconds


def tokens_per_second(
    llm: Any, batch: int, vocabulary: int, runs: int = 3, tokens: int = ANSWER
) -> list[float]:
    """Of several runs after one to warm up, each with all prompts at once."""
    inputs = prompts(batch, vocabulary)
    answers(llm, inputs, 16)
    return [batch * tokens / answers(llm, inputs, tokens)[1] for _ in range(runs)]
