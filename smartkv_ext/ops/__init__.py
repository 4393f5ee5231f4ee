"""The compiled ops, typed and documented, and the layout (`page_layout`, `TIERS`) and memory
(`empty_pool`) of the pages that they share.
Contract: docs/design/ops.md; specification: smartkv_ext.reference.

Shapes name their axes; ``n`` is a number of tokens. A tensor that an op refuses raises RuntimeError (ValueError for
bits, levels, head_dim and dtypes that are checked here) with the argument's name, what came and what is accepted; no
argument has been changed then. No op has a gradient. All tensors of a call are on the CPU or on one CUDA
device.
"""

from __future__ import annotations

from smartkv_ext.reference.layout import PAGE_SIZE, TIERS, PageLayout, page_layout

from . import _fakes as _fakes
from .attention import attention_mass, decode_attention, merge_states
from .basis import change_basis
from .info import available_kernel_sets, build_info, cpu_features, kernel_set_name
from .memory import empty_pool
from .pages import append_kv, compact_kv, dequantize_kv, quantize_kv
from .selection import gate_score, select_kv

__all__ = [
    "PAGE_SIZE",
    "TIERS",
    "PageLayout",
    "append_kv",
    "attention_mass",
    "available_kernel_sets",
    "build_info",
    "change_basis",
    "compact_kv",
    "cpu_features",
    "decode_attention",
    "dequantize_kv",
    "empty_pool",
    "gate_score",
    "kernel_set_name",
    "merge_states",
    "page_layout",
    "quantize_kv",
    "select_kv",
]
