"""Finds vLLM's CPU expert kernel and says whether it can run a layer; the kernel itself stays vLLM's.

The compiled library is loaded by itself, which takes 7 ms; importing vLLM's Python package for it takes 4 s
and 190 MB, which every expert host would pay. Loading it here and importing vLLM later in the same process
works: both open the same file. Without vLLM, or with one built for GPUs, there is no kernel and no error.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

from actors.expert_maths import ExpertMaths

# vLLM's kernels work in blocks of this many columns, and pad the intermediate size to it at load.
_BLOCK: Final = 32


@dataclass(frozen=True, slots=True)
class VllmCpuOps:
    """The two operators of vLLM's CPU build that experts need."""

    fused_moe: Callable[..., None]
    """(out, x, w13, w2, b13, b2, topk_weights, topk_ids, skip_weighted, activation, isa)"""
    prepack: Callable[[torch.Tensor, torch.Tensor, str], None]
    """(weight [E, out, in], packed of the same shape, isa)"""


@cache
def vllm_cpu_ops() -> VllmCpuOps | None:
    """vLLM's CPU expert operators, loaded at the first call; ``None`` if there are none."""
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        library = _library()
        if library is None:
            return None
        try:
            torch.ops.load_library(library)
        except OSError:  # a GPU build without its driver here
            return None
    names = ("cpu_fused_moe", "prepack_moe_weight")
    if not all(hasattr(torch.ops._C, name) for name in names):
        return None
    # The overload itself: going through the packet resolves it anew at each call.
    return VllmCpuOps(torch.ops._C.cpu_fused_moe.default, torch.ops._C.prepack_moe_weight.default)


def vllm_cpu_isa(maths: ExpertMaths, dtype: torch.dtype) -> str | None:
    """``"amx"`` or ``"vec"``, whichever stock vLLM would run for this layer, or ``None`` if it could not."""
    if maths.activation is None or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    # swigluoai's rows alternate, so its intermediate size cannot be padded.
    if maths.hidden % _BLOCK or (maths.activation == "swigluoai" and maths.intermediate % _BLOCK):
        return None
    if vllm_cpu_ops() is None:
        return None
    return "amx" if dtype == torch.bfloat16 and _amx_ready() else "vec"


def padded_intermediate(maths: ExpertMaths) -> int:
    """The intermediate size after vLLM's padding; the added rows and columns are zero."""
    return -(-maths.intermediate // _BLOCK) * _BLOCK


@cache
def _amx_ready() -> bool:
    # Linux gives a process the tile registers on request only: without it the first tile instruction is
    # illegal and kills the process.
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def _library() -> Path | None:
    """The build of vLLM's operators for this processor, as vLLM itself would choose it."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    name = "_C"
    if platform.machine() in ("x86_64", "AMD64"):
        if not torch.cpu._is_avx512_supported():
            name = "_C_AVX2"
        elif not torch.cpu._is_avx512_bf16_supported():
            name = "_C_AVX512"
    return next(iter(sorted(Path(spec.origin).parent.glob(f"{name}.*so"))), None)
