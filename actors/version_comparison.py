"""What was learnt beside the version before, on text: both read each text once, and all that is asked of them is had.

Shape suffixes: T = tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from actors.text_routing import counted

Choices = Mapping[int, Sequence[int]]
"""Layer index → how often each of its experts was chosen."""

# Of what the version before says of texts, kept while the other reads them: to go from one version to the other
# moves all weights that were trained, which for short texts takes as long as reading them.
_AT_ONCE_BYTES: Final = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of two versions on some texts."""

    bits: tuple[tuple[float, float], ...]
    """Of each text, that the version before and that what was learnt takes for it, after its first token."""
    divergence: float
    """KL from the version before to what was learnt, nats per token; 0 without texts."""
    before: Choices
    after: Choices


def compare(
    model: Any,
    as_before: Callable[[], AbstractContextManager[None]],
    texts: Sequence[Sequence[int]],
    told: Callable[[], None] = lambda: None,
) -> Comparison:
    """Of a model, and of what it is within `as_before`; `texts`: as token numbers; `told` is called after each."""
    bits, nats = [], 0.0
    with torch.inference_mode():
        before, after = _nothing(model), _nothing(model)
        for together in _batches(texts, _AT_ONCE_BYTES // (4 * model.get_input_embeddings().num_embeddings)):
            with as_before():
                read = [_read(model, tokens, before) for tokens in together]
            for tokens, before_TV in zip(together, read, strict=True):
                now_TV = _read(model, tokens, after)
                bits.append((_bits(before_TV, tokens), _bits(now_TV, tokens)))
                nats += F.kl_div(now_TV, before_TV, log_target=True, reduction="sum").item()
                told()
    return Comparison(tuple(bits), nats / max(1, sum(map(len, texts))), _as_lists(before), _as_lists(after))


def _batches(texts: Sequence[Sequence[int]], tokens: int) -> Iterator[list[Sequence[int]]]:
    """One text after the other, as many together as have so many tokens at most; one at least."""
    found: list[Sequence[int]] = []
    for text in texts:
        if found and sum(map(len, found)) + len(text) > tokens:
            yield found
            found = []
        found.append(text)
    if found:
        yield found


def bits_of(model: nn.Module, tokens: Sequence[int]) -> float:
    """Bits that a model takes for a text, given as token numbers, after its first."""
    with torch.inference_mode():
        return _bits(_read(model, tokens), tokens)


def _read(
    model: nn.Module, tokens: Sequence[int], counts: dict[int, torch.Tensor] | None = None
) -> torch.Tensor:
    """Logarithms of probabilities [T, V] of a text; what its routers choose is added to `counts`."""
    rows_1T = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    with counted(model, counts):
        return F.log_softmax(model(input_ids=rows_1T, use_cache=False).logits[0].float(), dim=-1)


def _bits(read_TV: torch.Tensor, tokens: Sequence[int]) -> float:
    wanted_T = torch.tensor(tokens[1:], device=read_TV.device, dtype=torch.int64)
    return -read_TV[:-1].gather(1, wanted_T[:, None]).sum().item() / math.log(2)


def _nothing(model: nn.Module) -> dict[int, torch.Tensor]:
    with counted(model) as counts:
        return counts


def _as_lists(counts: Mapping[int, torch.Tensor]) -> Choices:
    return {layer: found.tolist() for layer, found in counts.items()}
