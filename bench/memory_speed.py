"""2 MB pages, and the read bandwidth that is everything's floor."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.timing import Work, copies_for_cold_cache, medians
from smartkv_ext.ops.memory import HUGE_PAGE, ask_for_huge_pages

BUFFER_BYTES = 1 << 25  # per read: long enough that starting threads costs under 2 %, short enough to take turns with
CUDA_BUFFER_BYTES = 1 << 29  # as long on a GPU


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, huge_pages: bool) -> torch.Tensor:
    """torch.empty; on a CPU with huge_pages in memory that was never touched and asks the kernel for 2 MB pages.

    Raises OSError where the system knows no madvise or refuses.
    """
    if not huge_pages or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    if not sys.platform.startswith("linux"):
        raise OSError(f"2 MB pages can be asked for on Linux only; this is {sys.platform}")
    wanted = torch.Size(shape).numel() * dtype.itemsize
    rounded = -(-wanted // HUGE_PAGE) * HUGE_PAGE
    raw = torch.empty(rounded + HUGE_PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    if not ask_for_huge_pages(raw[start : start + rounded]):
        raise OSError(ctypes.get_errno(), "madvise(MADV_HUGEPAGE) failed: this kernel grants no 2 MB pages")
    return raw[start : start + wanted].view(dtype).view(shape)


def cold_copies(x: torch.Tensor, count: int, device: torch.device, huge_pages: bool) -> list[torch.Tensor]:
    """``count`` copies of x in one allocation."""
    slab = empty((count, *x.shape), x.dtype, device, huge_pages)
    slab.copy_(x.to(device).expand_as(slab))  # one transfer, whatever the count
    return list(slab.unbind(0))


READS: dict[str, Callable[[torch.Tensor], Callable[[], Any]]] = {
    "sum float32": lambda x: x.sum,
    "sum int64": lambda x: x.view(torch.int64).sum,
    "max uint8": lambda x: x.view(torch.uint8).max,
    "dot float32": lambda x: lambda: torch.dot(*x.view(2, -1)),
}


def copy_within(x: torch.Tensor) -> Callable[[], Any]:
    """One half onto the other: reads and writes as many bytes together as x has."""
    to, source = x.view(2, -1).unbind(0)
    return lambda: to.copy_(source)


def ways_to_read(device: torch.device) -> dict[str, Work]:
    """Reads of cold memory by several kernels of torch, each in pages as torch gives and, where possible, of 2 MB; on a
    GPU also a copy."""
    works = {}
    cuda = device.type == "cuda"
    size = CUDA_BUFFER_BYTES if cuda else BUFFER_BYTES
    ways = READS | ({"copy": copy_within} if cuda else {})
    for huge in (False,) if cuda else (False, True):
        shape = (copies_for_cold_cache(size), size // 4)
        try:
            buffers = empty(shape, torch.float32, device, huge).fill_(1).unbind(0)
        except OSError:  # the small pages are all there is
            continue
        for name, read in ways.items():
            calls = [read(buffer) for buffer in buffers]
            works[f"{name}, 2 MB pages" if huge else name] = Work(calls, size)
    return works


def fastest_read(device: torch.device, seconds: float) -> tuple[str, Work]:
    """(name, work) of the fastest way to read; ``seconds``: about the time spent on each."""
    ways = ways_to_read(device)
    times = medians(list(ways.values()), seconds, device)
    best = min(zip(times, ways, strict=True))[1]
    return best, ways[best]
