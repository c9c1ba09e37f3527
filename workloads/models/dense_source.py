"""A dense model to be upcycled, whatever holds it: a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol

import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from cluster.errors import CheckpointError
from cluster.safetensors_headers import read_headers
from workloads.models.generation_defaults import write_generation_config
from workloads.models.gguf_source import GgufSource

# What a tokenizer, its template and the terms of use may consist of.
_COPIED_PATTERNS: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
)


class DenseSource(Protocol):
    """A dense model opened for reading, tensor by tensor, under Hugging Face's names."""

    config: PretrainedConfig

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """Load one tensor, in whatever floating-point type the source has or unpacks to."""

    def write_companions(self, folder: Path) -> None:
        """Write tokenizer, chat template, generation_config.json and licence files into ``folder``."""

    def close(self) -> None:
        """Let go of the files."""


def open_source(path: Path) -> DenseSource:
    """Open a GGUF file or a Hugging Face folder; raises CheckpointError if it is neither."""
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise CheckpointError(f"no such model: {path}", "give a GGUF file or a Hugging Face folder")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file", "give a GGUF file or a Hugging Face folder")
    return GgufSource(path)


class FolderSource:
    """A Hugging Face folder: config.json, safetensors, tokenizer files."""

    def __init__(self, path: Path) -> None:
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path / 'config.json'} is missing", "give a Hugging Face model's folder")
        try:
            # The folder is data: no code from it is run, and nobody is asked whether it may be.
            self.config: PretrainedConfig = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise CheckpointError(f"{path / 'config.json'} is not understood: {reason}") from error
        self._path = path
        self._entries, _ = read_headers(path)
        self._open = ExitStack()
        self._files = {
            file: self._open.enter_context(safe_open(path / file, framework="pt"))
            for file in {entry.file for entry in self._entries.values()}
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def tensor(self, name: str) -> torch.Tensor:
        loaded: torch.Tensor = self._files[self._entries[name].file].get_tensor(name)
        return loaded

    def write_companions(self, folder: Path) -> None:
        for pattern in _COPIED_PATTERNS:
            for file in self._path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        if (self._path / "generation_config.json").is_file():
            shutil.copyfile(self._path / "generation_config.json", folder / "generation_config.json")
        else:
            write_generation_config(self.config, folder)

    def close(self) -> None:
        self._open.close()
