"""fp32 PyTorch specification of every op: slow, plain, and what all kernels are tested against. Depends on torch
alone."""

from .attention import attention_mass, decode_attention, merge_states
from .basis import change_basis
from .gate import gate_score
from .hadamard import rotate
from .quantizer import append_kv, compact_kv, dequantize_kv, quantize_kv
from .select import select_kv
from .turns import key_shift

__all__ = [
    "append_kv",
    "attention_mass",
    "change_basis",
    "compact_kv",
    "decode_attention",
    "dequantize_kv",
    "gate_score",
    "key_shift",
    "merge_states",
    "quantize_kv",
    "rotate",
    "select_kv",
]
