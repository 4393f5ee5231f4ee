"""Memory of this process: the resident set (Linux), or what torch has allocated on a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import torch


class ResidentMemory:
    """The resident set."""

    @staticmethod
    def peak_bytes() -> int:
        """Largest since the last ``settle``."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

    @staticmethod
    def settle() -> int:
        """Give freed memory back to the system, forget the peak, and return what is held now."""
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps what was freed
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class CudaMemory:
    """What torch has allocated on the current GPU."""

    @staticmethod
    def peak_bytes() -> int:
        """Most since the last ``settle``."""
        return torch.cuda.max_memory_allocated()

    @staticmethod
    def settle() -> int:
        """Forget the peak, and return what is held now."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
