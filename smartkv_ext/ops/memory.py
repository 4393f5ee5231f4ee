"""Memory of a tier's pages."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch

HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def ask_for_huge_pages(x: torch.Tensor) -> bool:
    """Ask the system to back memory that nobody has touched yet with pages of 2 MB, where they lie within ``x`` (CPU,
    contiguous). False: it knows no such thing, refuses, or none fits. No byte more is held either way.
    """
    begin = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (x.data_ptr() + x.nbytes - begin) // HUGE_PAGE * HUGE_PAGE
    madvise = _madvise()
    return madvise is not None and size > 0 and madvise(begin, size, MADV_HUGEPAGE) == 0


def empty_pool(num_pages: int, page_bytes: int, device: torch.device | str) -> torch.Tensor:
    """Memory for the pages of a tier, uninitialised: ``append_kv`` writes what is read of it.

    On a CPU a large one asks the system for pages of 2 MB: a kernel that reads a long cache once per token waits for
    translations of addresses too, and they need a five-hundredth of them.

    Args:
        num_pages: pages of 64 records; 0 is allowed.
        page_bytes: of one, ``page_layout(tier, head_dim, itemsize).page_bytes``.

    Returns:
        (num_pages, page_bytes) uint8, contiguous, 64-byte aligned.
    """
    pool = torch.empty(num_pages, page_bytes, dtype=torch.uint8, device=device)
    if pool.device.type == "cpu" and pool.nbytes >= 2 * HUGE_PAGE:
        ask_for_huge_pages(pool)
    return pool
