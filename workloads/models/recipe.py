"""How to upcycle a dense model. No torch: every start asks whether the default model was made like this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.errors import CheckpointError

DTYPE_NAMES: Final = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Recipe:
    """``experts`` a layer, ``top_k`` of them per token, ``dtype`` on disk; CheckpointError if impossible."""

    experts: int = 8
    top_k: int = 2
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.experts < 2 or not 1 <= self.top_k <= self.experts:
            raise CheckpointError(
                f"{self.experts} experts of which {self.top_k} run per token cannot be made",
                "give at least 2 experts, and a top-k from 1 to their number",
            )
        if self.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"unknown dtype {self.dtype!r}", f"choose one of {', '.join(DTYPE_NAMES)}")
