"""generation_config.json: which tokens begin and end a text, and how to sample where a request does not say."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig

_FILE = "generation_config.json"


def write_generation_config(config: PretrainedConfig, folder: Path) -> None:
    """Write generation_config.json with the special tokens of ``config`` into ``folder``; no sampling."""
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)


def add_sampling(folder: Path, *, temperature: float, top_p: float) -> None:
    """Have requests to the model in ``folder`` that name no temperature or top_p sampled with these."""
    path = folder / _FILE
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    path.write_text(json.dumps(settings, indent=2) + "\n")
