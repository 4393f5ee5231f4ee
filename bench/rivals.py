"""The same work in eager torch: attention over an uncompressed cache, quantising, dequantising."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.session import Session
from bench.timing import Work
from smartkv_ext.reference.hadamard import rotate
from smartkv_ext.reference.layout import kv_bits

CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 8: 8}  # a code's share of a byte in the eager rivals


def attention_rivals(
    session: Session, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int
) -> dict[str, Work]:
    """Every query sees every key, so no way needs a mask. ``num_bytes`` of each: keys and values once."""
    groups = heads // kv_heads
    works = {}
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(batch, heads, q_len, head_dim, device=session.device).to(dtype)
        kv = session.copies(*torch.randn(2, batch, kv_heads, kv_len, head_dim, device=session.device).to(dtype))
        name = str(dtype).removeprefix("torch.")
        for label, function in attention_ways(groups).items():
            calls = [lambda q=q, k=k, v=v, f=function: f(q, k, v) for k, v in zip(*kv, strict=True)]
            works[f"{label} {name}"] = Work(calls, kv[0][0].nbytes * 2)
        if session.device.type == "cuda" and dtype is torch.bfloat16:
            works |= gpu_rivals(q, list(zip(*kv, strict=True)))
    return works


def gpu_rivals(q: torch.Tensor, kv: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Work]:
    """Flash attention of torch, and FlashInfer where it is installed and takes the shape: one query of one sequence."""

    def flash(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    found: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"flash bfloat16": flash}
    if importlib.util.find_spec("flashinfer") and q.shape[0] == q.shape[2] == 1:
        single = importlib.import_module("flashinfer").single_decode_with_kv_cache
        found["flashinfer bfloat16"] = lambda k, v: single(
            q[0, :, 0], k[0], v[0], kv_layout="HND", use_tensor_cores=True
        )
    works = {}
    for name, function in found.items():
        try:
            function(*kv[0])
        except RuntimeError as error:  # not on this GPU, or not for this shape
            print(f"{name}: {error}", file=sys.stderr)
            continue
        works[name] = Work([partial(function, k, v) for k, v in kv], kv[0][0].nbytes * 2)
    return works


def attention_ways(groups: int) -> dict[str, Callable[..., torch.Tensor]]:
    """name -> f(q (batch, heads, q_len, head_dim), k, v (batch, kv_heads, kv_len, head_dim)): softmax(q k^T) v."""

    def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The queries of a group as rows of one matrix: keys and values are read once."""
        rows = q.unflatten(1, (-1, groups)).flatten(2, 3)
        out = torch.softmax(rows @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1) @ v
        return out.unflatten(2, (groups, -1)).flatten(1, 2)

    return {"sdpa repeated": repeated, "sdpa gqa": grouped, "folded matmul": folded}


def rotation_matrix(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(head_dim, head_dim) R, so that x @ R rotates rows as the ops do."""
    return rotate(torch.eye(head_dim)).to(device, dtype)


def quantize_eagerly(
    k: torch.Tensor, v: torch.Tensor, mean: torch.Tensor, tier: int, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same steps as quantize_kv with uniform levels, in eager torch: k, v codes (uint8, packed) and their scales.

    k, v (batch, kv_heads, n, head_dim), mean (batch, kv_heads, head_dim); 3 bits take 4. ``rotation``: of
    ``rotation_matrix``; its dtype is that of the arithmetic.
    """
    packed = []
    centred = k.to(rotation.dtype) - mean[:, :, None].to(rotation.dtype)
    for x, bits in zip((centred, v.to(rotation.dtype)), kv_bits(tier), strict=True):
        y = x @ rotation
        scale = y.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        codes = (y / scale + 2 ** (bits - 1)).clamp_(0, 2**bits - 1).to(torch.uint8)
        per_byte = 8 // CONTAINER_BITS[bits]
        lanes = codes.unflatten(-1, (per_byte, -1)).unbind(-2)
        byte = lanes[0]
        for i, lane in enumerate(lanes[1:], 1):
            byte = byte | (lane << (i * CONTAINER_BITS[bits]))
        packed += [byte, scale]
    return packed[0], packed[1], packed[2], packed[3]


def dequantize_eagerly(
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    mean: torch.Tensor,
    tier: int,
    rotation: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of quantize_eagerly: k, v (batch, kv_heads, n, head_dim) bfloat16."""
    out = []
    for codes, scale, bits in zip((k_codes, v_codes), (k_scale, v_scale), kv_bits(tier), strict=True):
        width = CONTAINER_BITS[bits]
        lanes = [(codes >> (i * width)) & (2**width - 1) for i in range(8 // width)]
        y = (torch.cat(lanes, -1).to(rotation.dtype) - (2 ** (bits - 1) - 0.5)) * scale
        out.append(y @ rotation.T)
    return (out[0] + mean[:, :, None].to(rotation.dtype)).to(torch.bfloat16), out[1].to(torch.bfloat16)
