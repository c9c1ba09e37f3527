"""One model in one process: greedy tokens of stock vLLM, then of the mesh on several numbers of hosts.

Usage: python -m tests.integration.same_tokens_worker CHECKPOINT DTYPE PROMPTS TOKENS HOSTS...
Prints one JSON object: {"stock": [[ids]], "mesh": {"1": [[ids]], ...}, "logprobs": ...}.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
}


def prompts(count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Token-id prompts of different lengths, the same in every run."""
    import random

    generator = random.Random(7)
    return [
        {"prompt_token_ids": [generator.randrange(3, vocabulary) for _ in range(3 + 2 * i)]}
        for i in range(count)
    ]


def generate(llm: Any, inputs: list[dict[str, list[int]]], tokens: int) -> tuple[list[list[int]], list[Any]]:
    """Greedy token ids per prompt, and per position the top log-probabilities."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=10)
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
        for output in outputs
    ]
    return ids, logprobs


def engine(path: Path, dtype: str, **more: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(path),
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=16,
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        **more,
    )


def main() -> None:
    path, dtype = Path(sys.argv[1]), sys.argv[2]
    count, tokens, host_counts = int(sys.argv[3]), int(sys.argv[4]), [int(n) for n in sys.argv[5:]]
    import torch

    from actors.engine_plugin import ENABLED, LOAD_FORMAT, environment, register
    from actors.expert_host import ExpertHost
    from cluster.checkpoint import Checkpoint
    from cluster.config import PlacementConfig
    from cluster.messages import EngineSettings, HostSlot, HostSpec
    from cluster.placement import plan
    from cluster.table import PlacementTable
    from workloads.deploy import attention_arguments

    torch.set_num_threads(1)
    key = secrets.token_bytes(32)
    checkpoint = Checkpoint.open(path)
    inputs = prompts(count, checkpoint.text_config["vocab_size"])
    register()
    attention = attention_arguments(checkpoint, dtype)
    stock = engine(path, dtype, **attention)
    expected, expected_logprobs = generate(stock, inputs, tokens)
    stock.llm_engine.engine_core.shutdown()
    del stock
    gc.collect()

    tables, hosts = [], []
    for number in host_counts:
        slots = [HostSlot(f"h{i}", "g", "cpu", "n", 1 << 34, 1) for i in range(number)]
        placed = plan(checkpoint.moe_layers, slots, PlacementConfig(), item_bytes=4)
        addresses = {}
        for slot in slots:
            spec = HostSpec(
                host_id=slot.host_id,
                node_id="n",
                model_path=str(path),
                model=checkpoint.digest,
                manifest=checkpoint.digest,
                dtype=dtype,
                device="cpu",
                kernel="auto",
                threads=1,
                experts=placed.assignments[slot.host_id],
                unix=f"test-{secrets.token_hex(4)}-{slot.host_id}",
                tcp_ip="",
                tcp_port=0,
            )
            host = ExpertHost(spec, key)
            host.start()
            addresses[slot.host_id] = host.wait_ready(60)
            hosts.append(host)
        table = PlacementTable.from_plan(placed, checkpoint.digest).next_epoch(hosts=addresses)
        tables.append(table.to_json())

    settings = EngineSettings(
        table=tables[0],
        model=checkpoint.digest,
        moe_layers=tuple(layer.index for layer in checkpoint.moe_layers),
        node_id="n",
        hidden=checkpoint.hidden_size,
        top_k=checkpoint.top_k,
        dtype=dtype,
        max_rows=64,
        deadline_s=20.0,
        connect_timeout_s=20.0,
    )
    os.environ.update(environment(settings, key))
    mesh = engine(
        path,
        dtype,
        load_format=LOAD_FORMAT,
        worker_extension_cls="actors.engine_plugin.WorkerExtension",
        additional_config=ENABLED,
        **attention,
    )
    result: dict[str, Any] = {
        "stock": expected,
        "stock_logprobs": expected_logprobs,
        "mesh": {},
        "logprobs": {},
    }
    for number, table in zip(host_counts, tables, strict=True):
        mesh.collective_rpc("expertmesh_set_table", args=(table,))
        result["mesh"][str(number)], result["logprobs"][str(number)] = generate(mesh, inputs, tokens)
    result["kernel"] = sorted({host.report().kernel for host in hosts})
    model = mesh.collective_rpc("expertmesh_parameter_names")[0]
    result["expert_parameters_in_engine"] = [
        name for name in model if ".experts." in name or "routed_experts" in name
    ]
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
