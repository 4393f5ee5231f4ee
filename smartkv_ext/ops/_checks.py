"""The argument checks that are cheap in Python and deserve a ValueError or TypeError; the bindings check the rest."""

from __future__ import annotations

import torch

from smartkv_ext.reference.layout import DTYPES, check_format
from smartkv_ext.reference.levels import LEVELS


def check_levels(levels: str) -> None:
    """Raise ValueError unless ``levels`` names a set of reconstruction levels."""
    if levels not in LEVELS:
        raise ValueError(f"levels must be one of {', '.join(LEVELS)}; got {levels!r}")


def check_dtype(dtype: object, name: str) -> None:
    """Raise TypeError for what is no dtype, ValueError for a dtype that pages and kernels do not take."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype; got {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be one of float32, bfloat16, float16; got {str(dtype).removeprefix('torch.')}")


def check_tensor(tensor: object, name: str, dim: int) -> None:
    """Raise TypeError for what is no tensor, ValueError for another number of dimensions."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions; got shape {tuple(tensor.shape)}")


__all__ = ["check_dtype", "check_format", "check_levels", "check_tensor"]
