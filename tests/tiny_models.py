"""Tiny random checkpoints of real architectures, saved under the names that real checkpoints use.

Small enough to build in a second, and large enough in their weights that routing and tokens vary; stock vLLM
loads them on CPU with ``skip_tokenizer_init=True``. Prompts are lists of token ids below ``VOCAB``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

VOCAB: Final = 512

# hidden_size and the intermediate sizes are multiples of 32, as vLLM's CPU kernels want them, and differ from
# one another so that a transposed matrix cannot pass for a right one.
_SHARED: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# 576 = 512 + 64 is the one head size that vLLM's multi-head latent attention has for CPU and for DeepSeek.
_LATENT: Final[dict[str, Any]] = {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
}
_ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 8, "sliding_window": None},
    "olmoe": {"intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    "qwen2_moe": {
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
        "num_experts": 8,
    },
    "qwen3_moe": {
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        **_LATENT,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        **_LATENT,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe": {
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "head_dim": 32,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        "intermediate_size": 96,
        "num_local_experts": 8,
        "head_dim": 64,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 131072,
    },
    "granitemoe": {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 3},
}
ARCHITECTURES: Final = tuple(_ARCHITECTURES)

# What ``vllm.LLM`` needs beyond the usual to run an architecture in float32: with AMX, vLLM would otherwise
# choose a latent attention that packs its weights and takes 16-bit ones only.
ENGINE_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    arch: {"attention_backend": "CPU_MLA"} if arch in ("deepseek_v2", "deepseek_v3") else {}
    for arch in ARCHITECTURES
}


def make_tiny(
    arch: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "50GB",
    **changes: Any,
) -> Path:
    """Write a random checkpoint of ``arch`` (one of ``ARCHITECTURES``) into the folder ``path``; return it.

    The same seed gives the same weights. ``changes`` replace entries of the architecture's config, and a
    small ``max_shard_size`` such as "200KB" gives several files with an index.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(arch, **{**_SHARED, **_ARCHITECTURES[arch], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.dim() == 1 or "bias" in name:
                tensor.copy_(0.2 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(noise)
            else:
                # A gain of 1.5 per matrix keeps activations of order one and the router far from uniform.
                tensor.copy_(1.5 / math.sqrt(min(tensor.shape[-2:])) * noise)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    return path
