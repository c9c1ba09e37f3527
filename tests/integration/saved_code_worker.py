"""One tiny model, compiled, in one process: whether its code was saved or loaded, and what of the model it heeds.

Usage: python -m tests.integration.saved_code_worker CHECKPOINT CACHE
Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH = 12


def watched(asked: dict[str, Any]) -> Callable[..., None]:
    """In the dispatcher's place: experts that answer zeros, and note what the first layer asks."""

    def compute(layer: int, x: Any, weights: Any, ids: Any, out: Any) -> None:
        out.zero_()
        if layer == 0 and len(ids) == LENGTH:
            asked.update(experts=ids.tolist(), inputs=float(x.abs().sum()))

    return compute


def main() -> None:
    path, cache = Path(sys.argv[1]), sys.argv[2]
    os.environ.update(VLLM_USE_AOT_COMPILE="1", VLLM_CACHE_ROOT=cache)
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter

    from actors import engine_plugin
    from actors.router import engine_arguments
    from cluster.checkpoint import Checkpoint
    from cluster.config import Config
    from workloads.deploy import router_spec_for

    config = Config.model_validate(
        {
            "engine": {"kv_cache": "64MiB", "max_model_len": 128, "max_num_batched_tokens": 128},
            "versions": {"spare_experts": 1},
        }
    )
    spec = router_spec_for(config, Checkpoint.open(path), "float32", "tiny")
    engine_plugin.register()
    os.environ.update(engine_plugin.environment(spec.settings, b""))
    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    llm = LLM(**{**engine_arguments(spec), **options})
    asked: dict[str, Any] = {}
    engine_plugin._compute = watched(asked)

    def ask() -> dict[str, Any]:
        prompt = {"prompt_token_ids": list(range(3, 3 + LENGTH))}
        llm.generate(
            [prompt], SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), use_tqdm=False
        )
        return dict(asked)

    runner: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner  # type: ignore[attr-defined]
    layer = runner.model.model.layers[0]
    growing = next(module for module in layer.modules() if hasattr(module, "routed_experts")).router
    found = {"plain": ask()}
    growing.mask[0] = -1e30
    found["without the first"] = ask()
    growing.rows_SH.fill_(1000.0)  # for some rows the highest logit, for others the lowest
    growing.mask.zero_()
    found["with one more"] = ask()
    runner.model.model.embed_tokens.weight.data.zero_()
    found["other weights"] = ask()
    counted = {
        "saved": compilation_counter.num_aot_artifacts_saved,
        "loaded": compilation_counter.num_aot_artifacts_loaded,
    }
    print("RESULT " + json.dumps({**counted, "asked": found}))


if __name__ == "__main__":
    main()
