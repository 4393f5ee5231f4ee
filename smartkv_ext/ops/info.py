"""What was built and what runs here. Reads ``smartkv_ext._core``, which needs no torch."""

from __future__ import annotations

from typing import Any

from smartkv_ext import _core


def build_info() -> dict[str, Any]:
    """Version, compiler, compiler flags, whether CUDA kernels were built, and the kernel set of this process."""
    return {**_core.build_info(), "cpu_features": cpu_features(), "kernel_set": kernel_set_name()}


def cpu_features() -> list[str]:
    """Instruction set extensions of this CPU that a kernel set uses, such as ``avx512vnni``."""
    return list(_core.cpu_features())


def available_kernel_sets() -> list[str]:
    """Kernel sets that this CPU can run, best first; ``SMARTKV_ISA`` accepts their names."""
    return list(_core.available_kernel_sets())


def kernel_set_name() -> str:
    """The kernel set in use. RuntimeError if ``SMARTKV_ISA`` names one that is unknown or cannot run here."""
    return str(_core.kernel_set_name())
