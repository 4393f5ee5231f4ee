"""Shapes and dtypes of the ops for FakeTensor: what torch.compile and torch.export need to trace through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smartkv_ext.reference.layout import PAGE_SIZE, page_layout

from . import _library as _library  # registers the ops


def quantize_kv(
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    positions: Tensor,
    scores: Tensor,
    bits: int,
    levels: str,
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> Tensor:
    batch, num_kv_heads, n, head_dim = k.shape
    num_pages = (n + PAGE_SIZE - 1) // PAGE_SIZE
    page_bytes = page_layout(bits, int(head_dim), k.element_size()).page_bytes
    return k.new_empty((batch, num_kv_heads, num_pages, page_bytes), dtype=torch.uint8)


def dequantize_kv(
    pages: Tensor,
    k_mean: Tensor,
    head_dim: int,
    bits: int,
    levels: str,
    dtype: torch.dtype,
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, num_kv_heads, num_pages, _ = pages.shape
    shape = (batch, num_kv_heads, num_pages * PAGE_SIZE, head_dim)
    return pages.new_empty(shape, dtype=dtype), pages.new_empty(shape, dtype=dtype)


def append_kv(
    pools: Sequence[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    positions: Tensor,
    scores: Tensor,
    tiers: Tensor,
    tier_bits: Sequence[int],
    levels: str,
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> None:
    return None


def decode_attention(
    q: Tensor,
    pools: Sequence[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    k_mean: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    window_positions: Tensor,
    q_start: Tensor,
    tier_bits: Sequence[int],
    levels: str,
    softmax_scale: float,
    sliding_window: int = 0,
    return_mass: bool = False,
    precision: str = "auto",
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_kv_heads, num_tiers, max_pages = block_table.shape
    mass_shape: tuple[int, ...] = (batch, num_kv_heads, num_tiers, max_pages * PAGE_SIZE)
    window_shape: tuple[int, ...] = (batch, num_kv_heads, k_window.shape[2])
    if not return_mass:
        mass_shape = window_shape = (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:-1], dtype=torch.float32),
        q.new_empty(mass_shape, dtype=torch.float32),
        q.new_empty(window_shape, dtype=torch.float32),
    )


def attention_mass(
    q: Tensor,
    k: Tensor,
    k_positions: Tensor,
    q_start: Tensor,
    softmax_scale: float,
    sliding_window: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    return k.new_empty(k.shape[:-1], dtype=torch.float32)


def select_kv(
    scores: Tensor,
    current: Tensor,
    budgets: Tensor,
    page_bytes: Sequence[int],
    distortion: Sequence[float],
    evict_distortion: float = 1.0,
    zipf_offset: float = 64.0,
) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int8)


def compact_kv(
    pools: Sequence[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    targets: Tensor,
    k_mean: Tensor,
    tier_bits: Sequence[int],
    levels: str,
    dtype: torch.dtype,
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> None:
    return None


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])


def gate_score(keys: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return keys[0].new_empty((len(keys), *keys[0].shape[:-1]), dtype=torch.float32)


def change_basis(x: Tensor, matrix: Tensor, origin: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


for _fake in (
    quantize_kv,
    dequantize_kv,
    append_kv,
    decode_attention,
    attention_mass,
    select_kv,
    compact_kv,
    merge_states,
    gate_score,
    change_basis,
):
    torch.library.register_fake(f"smartkv::{_fake.__name__}", _fake)
