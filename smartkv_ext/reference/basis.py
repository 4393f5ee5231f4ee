"""fp32 reference of change_basis."""

from __future__ import annotations

import torch


def change_basis(
    x: torch.Tensor, matrix: torch.Tensor, origin: torch.Tensor | None = None, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """See smartkv_ext.ops.change_basis."""
    grouped = x.float().unflatten(1, (len(matrix), -1))
    if origin is not None:
        grouped = grouped - origin[:, None, None]
    grouped = grouped @ matrix[:, None]
    if shift is not None:
        grouped = grouped + shift[:, None, None]
    out: torch.Tensor = grouped.flatten(1, 2).to(x.dtype)
    return out
