"""A tiny random dense model with a tokenizer, as a Hugging Face folder and as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

TEXTS: Final = (
    "The river froze early that winter, and the children crossed it on their way to school.",
    "In 1969 two people walked on the Moon; 12 have done so since.",
    "a  2  3",
)
CHAT_TEMPLATE: Final = "{% for message in messages %}<|start|>{{ message['content'] }}{% endfor %}"
LLAMA_NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_tiny_dense(path: Path, model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Write a random dense model (hidden 64, 2 layers) with a byte-level BPE tokenizer into ``path``.

    The same seed gives the same weights. ``changes`` replace entries of the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # large enough that a wrong weight shows in the logits
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "LICENSE").write_text("Do what you like.\n")
    return path


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on ``TEXTS``: "<|start|>" is token 0, "<|end|>" token 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_gguf(dense: Path, file: Path, *, pre_tokenizer: str = "smollm") -> Path:
    """Write the model of ``dense`` (from :func:`make_tiny_dense`) as the GGUF file ``file``, in float32."""
    import json

    import gguf
    from safetensors.numpy import load_file

    config = json.loads((dense / "config.json").read_text())
    tokenizer = json.loads((dense / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in load_file(dense / "model.safetensors").items():
        if ".q_proj." in name:
            weight = permute(weight, config["num_attention_heads"])
        elif ".k_proj." in name:
            weight = permute(weight, config["num_key_value_heads"])
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of q and k rows: row i of a head beside row i + head_dim / 2."""
    by_head = weight.reshape(heads, weight.shape[0] // heads, weight.shape[1])
    half = by_head.shape[1] // 2
    woven = np.empty_like(by_head)
    woven[:, 0::2] = by_head[:, :half]
    woven[:, 1::2] = by_head[:, half:]
    return woven.reshape(weight.shape)


def gguf_name(name: str) -> str:
    """``model.layers.1.mlp.up_proj.weight`` → ``blk.1.ffn_up.weight``."""
    base, suffix = name.rsplit(".", 1)
    if base in LLAMA_NAMES:
        return f"{LLAMA_NAMES[base]}.{suffix}"
    _, _, layer, rest = base.split(".", 3)
    return f"blk.{layer}.{LLAMA_NAMES[rest]}.{suffix}"
