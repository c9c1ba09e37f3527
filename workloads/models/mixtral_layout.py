"""The dense Llama layout and the Mixtral layout it is upcycled to: names, shapes and configuration.

Mixtral is Llama with the MLP replaced by a router and experts of the same shape, so every other tensor keeps
its name. Pure functions; only configuration classes come from transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

from transformers import MixtralConfig, PretrainedConfig

from cluster.errors import CheckpointError
from cluster.expert_names import parse_expert_name

DENSE_MODEL_TYPES: Final = ("llama", "mistral", "qwen2")
# Mixtral's name of each matrix of the dense MLP.
EXPERT_PARTS: Final[Mapping[str, str]] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# What transformers writes of every model and no reader needs.
_CONFIG_CLUTTER: Final = frozenset(
    {
        "_name_or_path",
        "chunk_size_feed_forward",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
    }
)
# Buffers that old checkpoints carry and no loader reads.
_IGNORED_SUFFIX: Final = "rotary_emb.inv_freq"

Shapes = dict[str, tuple[int, ...]]


def check_dense(config: PretrainedConfig, names: Iterable[str], source: Path) -> None:
    """Raise CheckpointError unless the model is a dense one whose maths Mixtral can express."""
    layers = getattr(config, "num_hidden_layers", 0)
    if any(parse_expert_name(name, layers) for name in names):
        raise CheckpointError(
            f"{source} is a mixture of experts already ({config.model_type})", "serve it as it is"
        )
    if config.model_type not in DENSE_MODEL_TYPES:
        raise CheckpointError(
            f"{source}: models of type {config.model_type!r} cannot be upcycled",
            f"give a dense model of type {', '.join(DENSE_MODEL_TYPES)}",
        )
    if config.hidden_act != "silu":
        raise CheckpointError(
            f"{source}: activation {config.hidden_act!r}, Mixtral's experts compute silu",
            "give another model",
        )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{source} is quantised", "give the model in bfloat16, float16 or float32")
    if getattr(config, "use_sliding_window", False):
        raise CheckpointError(
            f"{source}: only some layers have a sliding window, which Mixtral cannot express",
            "give another model",
        )


def check_shapes(config: PretrainedConfig, found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raise CheckpointError if a tensor is missing, of another shape, or has no place in Mixtral (biases)."""
    expected = dense_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{source} lacks the tensor {name}", "fetch the model again")
        if found[name] != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {found[name]}, its configuration says {shape}",
                "fetch the model again",
            )
    extra = [name for name in found if name not in expected and not _is_ignored(name, config)]
    if extra:
        raise CheckpointError(
            f"{source}: Mixtral has no place for {extra[0]} ({len(extra)} such tensors)",
            "give a Llama-like model without biases, or its Hugging Face folder instead of a GGUF file",
        )


def dense_shapes(config: PretrainedConfig) -> Shapes:
    """Names and shapes of all tensors of a dense Llama-like model (no ``lm_head`` where it is tied)."""
    hidden, inter = config.hidden_size, config.intermediate_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= attention_shapes(config, layer)
        for part in EXPERT_PARTS.values():
            shape = (hidden, inter) if part == "down_proj" else (inter, hidden)
            shapes[dense_mlp_name(layer, part)] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def attention_shapes(config: PretrainedConfig, layer: int) -> Shapes:
    """Names and shapes of what a decoder layer has in both layouts: attention and the two norms."""
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (query, hidden),
        f"{prefix}.self_attn.k_proj.weight": (key, hidden),
        f"{prefix}.self_attn.v_proj.weight": (key, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, query),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


def dense_mlp_name(layer: int, part: str) -> str:
    """``part`` is ``gate_proj``, ``up_proj`` or ``down_proj``."""
    return f"model.layers.{layer}.mlp.{part}.weight"


def expert_name(layer: int, expert: int, part: str) -> str:
    """``part`` is ``w1`` (gate), ``w2`` (down) or ``w3`` (up)."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"


def router_name(layer: int) -> str:
    """The router's matrix, [experts, hidden]."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def mixtral_config(dense: PretrainedConfig, *, experts: int, top_k: int, dtype: str) -> dict[str, Any]:
    """config.json of the upcycled model: the dense numbers, and ``experts`` of which ``top_k`` run."""
    config = MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        initializer_range=dense.initializer_range,
        rms_norm_eps=dense.rms_norm_eps,
        pad_token_id=dense.pad_token_id,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        tie_word_embeddings=dense.tie_word_embeddings,
        sliding_window=getattr(dense, "sliding_window", None),
        rope_parameters=dense.rope_parameters,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        architectures=["MixtralForCausalLM"],
        dtype=dtype,
    )
    content: dict[str, Any] = config.to_dict()
    # Readers older than rope_parameters look here, and would silently assume Mixtral's 1e6.
    content["rope_theta"] = dense.rope_parameters["rope_theta"]
    return {key: value for key, value in content.items() if key not in _CONFIG_CLUTTER}


def upcycled_bytes(config: PretrainedConfig, *, experts: int, item_bytes: int) -> int:
    """Bytes of all tensors of the upcycled model."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    dense = sum(prod(shape) for shape in dense_shapes(config).values())
    mlp = 3 * hidden * config.intermediate_size
    return item_bytes * (dense + layers * ((experts - 1) * mlp + experts * hidden))


def _is_ignored(name: str, config: PretrainedConfig) -> bool:
    tied_head = name == "lm_head.weight" and config.tie_word_embeddings
    return bool(name.endswith(_IGNORED_SUFFIX) or tied_head)
