"""One tiny model in one process: what stock vLLM answers, or the mesh with one policy of the capacity.

Usage: python -m tests.integration.capacity_worker CHECKPOINT stock|dropless|drop|reroute|defer
Prints one JSON object; see `answers`, `serve` and, beside stock vLLM's answers, `gates`.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.messages import CapacitySettings, EngineSettings, RouterSpec

# Prompts come in steps of 256 tokens with room for 64 rows an expert, on average all of which is taken; alone, or
# when all decode, they are below the 40 that an expert takes in any case.
LARGEST, TOKENS, BLOCK = 256, 32, 32
CAPACITY = CapacitySettings(factor=1.0, min_rows=40, coefficient=0.0, coefficient_max=0.5)
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 32,
    "max_num_batched_tokens": LARGEST,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": BLOCK,
    "distributed_executor_backend": "uni",
    "enable_prefix_caching": True,
}


def prompts(vocabulary: int) -> list[dict[str, list[int]]]:
    """24 of 17 to 40 token ids, the same in every run."""
    generator = random.Random(7)
    return [
        {"prompt_token_ids": [generator.randrange(3, vocabulary) for _ in range(length)]}
        for length in range(40, 16, -1)
    ]


def answers(llm: Any, inputs: list[dict[str, list[int]]], tokens: int = TOKENS) -> dict[str, Any]:
    """Greedy token ids, what each answer says of itself, and how much of each prompt was taken from the cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "marks": [(output.kv_transfer_params or {}).get("expertmesh") for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def hosts_of(checkpoint: Any, key: bytes) -> tuple[list[Any], str]:
    """Two hosts that share the experts, and their placement table."""
    from actors.expert_host import ExpertHost
    from cluster.config import PlacementConfig
    from cluster.messages import HostSlot, HostSpec
    from cluster.placement import plan
    from cluster.table import PlacementTable

    slots = [HostSlot(f"h{i}", "g", "cpu", "n", 1 << 34, 1) for i in range(2)]
    placed = plan(checkpoint.moe_layers, slots, PlacementConfig(), item_bytes=4)
    hosts, addresses = [], {}
    for slot in slots:
        spec = HostSpec(
            host_id=slot.host_id,
            node_id="n",
            model_path=str(checkpoint.path),
            model=checkpoint.digest,
            manifest=checkpoint.digest,
            dtype="float32",
            device="cpu",
            kernel="auto",
            threads=1,
            experts=placed.assignments[slot.host_id],
            unix=f"test-{secrets.token_hex(4)}-{slot.host_id}",
            tcp_ip="",
            tcp_port=0,
        )
        hosts.append(ExpertHost(spec, key))
        hosts[-1].start()
        addresses[slot.host_id] = hosts[-1].wait_ready(60)
    return hosts, PlacementTable.from_plan(placed, checkpoint.digest).next_epoch(hosts=addresses).to_json()


def watch(busiest: list[list[int]]) -> None:
    """Note of every dispatch its rows, and how many of them the busiest expert gets."""
    from actors import engine_plugin

    inner = engine_plugin.capacity_limit._dispatcher  # type: ignore[union-attr]

    class Watched:
        def __call__(self, layer: int, x: Any, weights: Any, ids: Any, out: Any) -> None:
            chosen = ids.numpy()
            busiest.append([len(chosen), int(np.bincount(chosen[chosen >= 0]).max())])
            inner(layer, x, weights, ids, out)

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    engine_plugin.capacity_limit._dispatcher = Watched()  # type: ignore[union-attr, assignment]


def serve(policy: str, spec: RouterSpec, key: bytes, inputs: list[dict[str, list[int]]]) -> dict[str, Any]:
    """One engine with this policy, as the router deployment makes it, and its answers."""
    from vllm import LLM

    from actors import engine_plugin
    from actors.router import engine_arguments

    engine_plugin.register()

    settings = replace(spec.settings, capacity=replace(CAPACITY, policy=policy))
    os.environ.update(engine_plugin.environment(settings, key))
    llm = LLM(**engine_arguments(replace(spec, settings=settings)))
    llm.collective_rpc("expertmesh_attach")
    busiest: list[list[int]] = []
    if policy != "dropless":
        watch(busiest)
    result: dict[str, Any] = {
        "direct": engine_plugin._compute is engine_plugin._dispatcher,
        "scheduler": type(llm.llm_engine.engine_core.engine_core.scheduler).__name__,
        **answers(llm, inputs),
        "alone": answers(llm, inputs[1:2]),
        "busiest": busiest,
        "stats": llm.collective_rpc("expertmesh_stats")[0],
    }
    if policy == "drop":
        # A marked request's prompt, cleanly; then a dialogue that goes on from its answer.
        prompt = inputs[0]["prompt_token_ids"]
        result["again"] = answers(llm, [inputs[0]], 1)
        result["on"] = answers(llm, [{"prompt_token_ids": prompt + result["tokens"][0]}], 1)
    llm.llm_engine.engine_core.shutdown()
    return result


def gates() -> dict[str, dict[str, float]]:
    """How far `cluster.gate` is from vLLM's own routers: other experts chosen, and the largest error of a weight."""
    import torch
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    from actors.scored_router import gate_of

    experts, top_k = 16, 4
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(64, experts, generator=generator)
    bias = torch.randn(experts, generator=generator)
    grouped = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
    routers: dict[str, dict[str, Any]] = {
        "mixtral": {},
        "olmoe": {"renormalize": False},
        "deepseek_v2": {**grouped, "renormalize": False, "routed_scaling_factor": 1.5},
        "deepseek_v3": {
            **grouped,
            "scoring_func": "sigmoid",
            "e_score_correction_bias": bias,
            "routed_scaling_factor": 2.5,
        },
    }
    found = {}
    for name, options in routers.items():
        router = create_fused_moe_router(top_k, experts, **options)
        gate = gate_of(name, router)
        hidden = torch.zeros(len(logits), 8)
        weights, ids = router.select_experts(hidden_states=hidden, router_logits=logits)
        preferred = np.argsort(-gate.preferences(logits.numpy()), axis=1)[:, :top_k]
        other = sum(set(a) != set(b) for a, b in zip(preferred.tolist(), ids.tolist(), strict=True))
        # From other experts' weights to the chosen ones': what is left of those must not matter.
        old = ids.roll(1, 0).numpy().astype(np.int64)
        scores = torch.from_numpy(gate.scores(logits.numpy())).gather(1, torch.from_numpy(old))
        scale = float(weights.sum(1)[0]) if gate.renormalize else options.get("routed_scaling_factor", 1.0)
        before = scale * (scores / scores.sum(1, keepdim=True) if gate.renormalize else scores)
        derived = gate.reweigh(logits.numpy(), before.numpy(), old, ids.numpy().astype(np.int64))
        found[name] = {"other": other, "error": float(np.abs(derived - weights.numpy()).max())}
    return found


def main() -> None:
    path, policy = Path(sys.argv[1]), sys.argv[2]
    import torch

    from cluster.checkpoint import Checkpoint

    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(path)
    inputs = prompts(checkpoint.text_config["vocab_size"])
    if policy == "stock":
        from vllm import LLM

        print("RESULT " + json.dumps({**answers(LLM(str(path), **ENGINE), inputs), "gates": gates()}))
        return
    key = secrets.token_bytes(32)
    hosts, table = hosts_of(checkpoint, key)
    settings = EngineSettings(
        table=table,
        model=checkpoint.digest,
        moe_layers=tuple(layer.index for layer in checkpoint.moe_layers),
        node_id="n",
        hidden=checkpoint.hidden_size,
        top_k=checkpoint.top_k,
        dtype="float32",
        max_rows=LARGEST,
        deadline_s=20.0,
        connect_timeout_s=20.0,
    )
    spec = RouterSpec(str(path), "tiny", settings, ENGINE, {}, (), 1, 1.0, 1.0, "", 0)
    print("RESULT " + json.dumps(serve(policy, spec, key, inputs)))
    for host in hosts:
        host.close()


if __name__ == "__main__":
    main()
