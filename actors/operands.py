"""What a dispatch is made of, checked: rows are copied as plain memory, where a wrong tensor would read or
overwrite whatever lies beside it."""

from __future__ import annotations

import torch

from actors.buffers import Layout


def check_operands(
    layout: Layout,
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    out_TH: torch.Tensor,
) -> None:
    """ValueError that names the first of the four that does not fit the others or the connection."""
    dtype = getattr(torch, layout.dtype)
    rows = x_TH.numel() // layout.hidden
    for name, tensor, wanted, width in (
        ("x", x_TH, dtype, layout.hidden),
        ("weights", weights_TK, torch.float32, layout.top_k),
        ("ids", ids_TK, torch.int32, layout.top_k),
        ("out", out_TH, dtype, layout.hidden),
    ):
        if tensor.device.type != "cpu":
            raise ValueError(f"dispatch: {name} lies on {tensor.device}, rows are taken from main memory")
        if tensor.dtype != wanted:
            raise ValueError(f"dispatch: {name} is {tensor.dtype}, {wanted} is wanted")
        if tensor.numel() != rows * width:
            shape = tuple(tensor.shape)
            raise ValueError(f"dispatch: {name} has the shape {shape}, not {rows} rows of {width}")
        if not tensor.is_contiguous():
            raise ValueError(f"dispatch: {name} is not contiguous: strides {tensor.stride()}")
