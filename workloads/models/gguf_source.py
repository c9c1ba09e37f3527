"""A dense Llama-like model in a GGUF file, unpacked tensor by tensor.

transformers would load the whole file in float32 at once; reading it here keeps one tensor in memory, and
lets a wrong tokenizer be refused, which transformers converts without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from cluster.errors import CheckpointError
from workloads.models.generation_defaults import write_generation_config

_TOP_LEVEL: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource:
    """One GGUF file; see :class:`workloads.models.dense_source.DenseSource`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            reader = GGUFReader(path)
            self.config: PretrainedConfig = AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
        except (OSError, ValueError, KeyError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise CheckpointError(f"{path} cannot be read: {reason}", "fetch the file again") from error
        self._architecture = str(_field(reader, "general.architecture"))
        scaling = _field(reader, f"{self._architecture}.rope.scaling.type")
        if scaling not in (None, "none"):
            raise CheckpointError(
                f"{path}: rotary scaling {scaling!r} is not read from GGUF files",
                "give the model's Hugging Face folder instead",
            )
        # GGUF keeps float32: 1e-5 comes back as 9.99999974e-06, and engines compare and print the number.
        self.config.rms_norm_eps = shortest_float32(self.config.rms_norm_eps)
        self._pre_tokenizer = _field(reader, "tokenizer.ggml.pre")
        self._tokenizer_model = _field(reader, "tokenizer.ggml.model")
        self._tensors: dict[str, ReaderTensor] = {hf_name(item.name): item for item in reader.tensors}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF lists dimensions from the fastest one.
        return {
            name: tuple(int(size) for size in reversed(item.shape)) for name, item in self._tensors.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        item = self._tensors[name]
        weight = dequantize(item.data, item.tensor_type)
        if self._architecture == "llama" and ".self_attn.q_proj." in name:
            weight = unpermute(weight, self.config.num_attention_heads)
        elif self._architecture == "llama" and ".self_attn.k_proj." in name:
            weight = unpermute(weight, self.config.num_key_value_heads)
        return torch.from_numpy(np.array(weight, copy=True))

    def write_companions(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(
            self._path.parent, gguf_file=self._path.name, local_files_only=True
        )
        if self._tokenizer_model == "gpt2":
            self._restore_pre_tokenizer(tokenizer.backend_tokenizer)
        tokenizer.model_max_length = self.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        content: dict[str, Any] = json.loads(file.read_text())
        # Every version of transformers knows this class; "backend" and "is_local" describe this run only.
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):
            content.pop(key, None)
        file.write_text(json.dumps(content, indent=2) + "\n")
        write_generation_config(self.config, folder)

    def close(self) -> None:
        self._tensors.clear()

    def _restore_pre_tokenizer(self, backend: Any) -> None:
        """Split text as the merges were learned; transformers has no rule for SmolLM's kind.

        Without the rule that every digit stands alone, ``"  2"`` becomes two single spaces and a digit,
        where the model was trained on one double space.
        """
        if self._pre_tokenizer == "smollm":
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        elif self._pre_tokenizer not in (None, "default", "gpt-2") and isinstance(
            backend.pre_tokenizer, pre_tokenizers.ByteLevel
        ):
            raise CheckpointError(
                f"{self._path}: how the tokenizer {self._pre_tokenizer!r} splits text is not known",
                "give the model's Hugging Face folder instead, which has tokenizer.json",
            )


def hf_name(name: str) -> str:
    """``blk.3.ffn_up.weight`` → ``model.layers.3.mlp.up_proj.weight``; unknown names stay as they are."""
    base, _, suffix = name.rpartition(".")
    if base in _TOP_LEVEL:
        return f"{_TOP_LEVEL[base]}.{suffix}"
    pieces = base.split(".")
    if len(pieces) == 3 and pieces[0] == "blk" and pieces[2] in _IN_LAYER:
        return f"model.layers.{pieces[1]}.{_IN_LAYER[pieces[2]]}.{suffix}"
    if "_exps" in name and len(pieces) >= 2:
        return f"model.layers.{pieces[1]}.mlp.experts.{pieces[-1]}"  # named so that it reads as an expert
    return name


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of the rows of q and k, [heads * head_dim, hidden].

    llama.cpp rotates neighbouring pairs (0, 1), (2, 3), ...; Hugging Face pairs row i with i + head_dim / 2.
    """
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def shortest_float32(value: float) -> float:
    """The shortest decimal number that is the same float32."""
    return float(str(np.float32(value)))


def _field(reader: GGUFReader, name: str) -> object:
    field = reader.get_field(name)
    return None if field is None else field.contents()
