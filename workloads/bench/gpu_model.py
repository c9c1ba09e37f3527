"""A Qwen3-MoE of random weights, as a checkpoint that engines and hosts read like any other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

_STD: Final = 0.02


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The default is shape A: 128 experts, top-8, hidden 2048, intermediate 768."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 151_936

    def config(self, dtype: str) -> dict[str, Any]:
        """As transformers and vLLM read it."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": dtype,
            "torch_dtype": dtype,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


def make(
    folder: Path,
    shape: ModelShape,
    dtype: str = "bfloat16",
    device: str = "cuda",
    seed: int = 0,
    popularity_LE: torch.Tensor | None = None,
) -> Path:
    """Write the checkpoint, a file a layer; the same seed gives the same weights on the same kind of device.

    `popularity_LE`: how often each expert is to be chosen, as shares of its layer; without it all alike. All tokens
    then have a direction in common, along which routers prefer experts, so that the shares roughly come true.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(seed)
    kind: torch.dtype = getattr(torch, dtype)
    index: dict[str, str] = {}
    total = 0

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device=device) * _STD).to(kind).cpu()

    def ones(*size: int) -> torch.Tensor:
        return torch.ones(*size, dtype=kind)

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    # What layers add must not drown what all tokens have in common.
    quiet = 1.0 if popularity_LE is None else 0.1
    common_H = torch.ones(shape.hidden, device=device)
    common_H[::2] = -1.0

    def gate(layer: int) -> torch.Tensor:
        if popularity_LE is None:
            return random(shape.experts, H)
        # What a token's direction of its own adds to a logit has a deviation of about one, and half of a token's
        # length is common to all.
        own = torch.randn(shape.experts, H, generator=generator, device=device) * (2 / H) ** 0.5
        own -= (own @ common_H / H)[:, None] * common_H
        bias_E = preference(popularity_LE[layer].to(device), shape.top_k, generator)
        return (own + bias_E[:, None] * common_H / H * 2**0.5).to(kind).cpu()

    H, I, D = shape.hidden, shape.intermediate, shape.head_dim  # noqa: E741, the letters of the shapes
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        tensors = {
            f"{at}.input_layernorm.weight": ones(H),
            f"{at}.post_attention_layernorm.weight": ones(H),
            f"{at}.self_attn.q_proj.weight": random(shape.heads * D, H),
            f"{at}.self_attn.k_proj.weight": random(shape.kv_heads * D, H),
            f"{at}.self_attn.v_proj.weight": random(shape.kv_heads * D, H),
            f"{at}.self_attn.o_proj.weight": random(H, shape.heads * D) * quiet,
            f"{at}.self_attn.q_norm.weight": ones(D),
            f"{at}.self_attn.k_norm.weight": ones(D),
            f"{at}.mlp.gate.weight": gate(layer),
        }
        # All of a kind at once: one copy off the device instead of hundreds.
        kinds = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
        for part, (rows, columns) in kinds.items():
            for expert, matrix in enumerate(random(shape.experts, rows, columns)):
                tensors[f"{at}.mlp.experts.{expert}.{part}.weight"] = matrix.clone()
        write(f"model-{layer:05}.safetensors", tensors)
    embedding = torch.randn(shape.vocabulary, H, generator=generator, device=device)
    embedding = embedding * _STD if popularity_LE is None else embedding + common_H
    write(
        "model-dense.safetensors",
        {
            "model.embed_tokens.weight": embedding.to(kind).cpu(),
            "model.norm.weight": ones(H),
            "lm_head.weight": random(shape.vocabulary, H),
        },
    )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(shape.config(dtype)))
    return folder


def preference(share_E: torch.Tensor, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """What to add to logits that are N(0, 1), so that the top-k are about these shares of the time each expert."""
    share_E = (share_E / share_E.sum()).clamp_min(1e-5).float()
    noise = torch.randn(8192, len(share_E), generator=generator, device=share_E.device)
    bias_E = torch.zeros_like(share_E)
    for _ in range(100):
        chosen = (noise + bias_E).topk(top_k, dim=1).indices
        found_E = torch.bincount(chosen.flatten(), minlength=len(share_E)) / chosen.numel()
        bias_E += 0.3 * (share_E.log() - found_E.clamp_min(1e-5).log())
    return bias_E - bias_E.mean()
