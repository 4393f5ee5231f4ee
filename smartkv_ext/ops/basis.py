"""Rows of keys or queries in another basis: change_basis."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as _library  # registers the ops

_change_basis = torch.ops.smartkv.change_basis.default


def change_basis(x: Tensor, matrix: Tensor, origin: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """``(x - origin[kv_head]) @ matrix[kv_head] + shift[kv_head]`` for the rows of every head, in float32 whatever the
    dtype of x: one call where eager torch needs up to five, which is what a decode step's few rows cost.

    Args:
        x: (batch, num_heads, n, head_dim), float32, bfloat16 or float16, last dimension contiguous. Head i belongs to
            KV head i // (num_heads / num_kv_heads).
        matrix: (num_kv_heads, head_dim, head_dim) float32, in by out.
        origin, shift: (num_kv_heads, head_dim) float32; None: none.

    Returns:
        (batch, num_heads, n, head_dim), dtype of x.

    Raises:
        RuntimeError: any argument.
    """
    return _change_basis(x, matrix, origin, shift)  # type: ignore[no-any-return]
