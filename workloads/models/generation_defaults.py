"""generation_config.json: which tokens begin and end a text. How to sample stays the caller's choice."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig


def write_generation_config(config: PretrainedConfig, folder: Path) -> None:
    """Write generation_config.json with the special tokens of ``config`` into ``folder``."""
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
