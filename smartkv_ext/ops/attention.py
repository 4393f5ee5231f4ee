"""Attention over a compressed cache: decode_attention, attention_mass, merge_states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library as _library  # registers the ops

_decode_attention = torch.ops.smartkv.decode_attention.default
_attention_mass = torch.ops.smartkv.attention_mass.default
_merge_states = torch.ops.smartkv.merge_states.default


def _position(q_start: Tensor | int, q: Tensor) -> Tensor:
    return torch.full((1,), q_start, dtype=torch.int64, device=q.device) if isinstance(q_start, int) else q_start


def decode_attention(
    q: Tensor,
    pools: Sequence[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    k_mean: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    window_positions: Tensor | None,
    q_start: Tensor | int,
    tier_bits: Sequence[int],
    levels: str = "gaussian",
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    return_mass: bool = False,
    precision: str = "auto",
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention of a few queries over paged records of several tiers and a full-precision window, fused.

    A query is at position ``q_start + i`` and sees a key at ``position`` when ``0 <= position <= query position`` and,
    with a sliding window, ``position > query position - sliding_window``. Codes are never expanded: the query is
    rotated once, and so is the output.

    Args:
        q: (batch, num_heads, q_len, head_dim), float32, bfloat16 or float16, last dimension contiguous. Query head i
            belongs to kv head i // (num_heads / num_kv_heads).
        pools: per tier (num_pages, page_bytes) uint8, contiguous, 64-byte aligned; 16-bit pages hold the dtype of q.
        block_table: (batch, num_kv_heads, num_tiers, max_pages) int32; entries behind ceil(seqlen / 64) are not read.
        cache_seqlens: (batch, num_kv_heads, num_tiers) int32, records per list.
        k_mean: (batch, num_kv_heads, head_dim), float32.
        k_window, v_window: (batch, num_kv_heads, window_len, head_dim), dtype of q; window_len may be 0. None for
            these and window_positions: no window.
        window_positions: (batch, window_len) int32; values of a slot that no query sees may be NaN. -1: the slot
            holds no token. A slot that waits for a token may have the position that the token will have.
        q_start: (1,) int64, position of the first query. Kernels read it where it is, so a CUDA graph or a compiled
            step serves all positions. An int is put on the device of q first, which a graph would freeze.
        tier_bits: ascending, of 2, 302 (K3V2), 3, 403 (K4V3), 4, 8 and 16.
        levels: "gaussian" or "uniform", as the pages were written.
        softmax_scale: default head_dim ** -0.5.
        sliding_window: 0: none.
        return_mass: also return the probability that each key received.
        precision: least precision of queries and probabilities where they meet codes; a kernel set without such
            products is more precise. "fp32"; "int16": 15 and 16 bits (relative error about 1e-4); "int8": 8 bits each
            (below 2e-2); "auto": int16 beside 8-bit codes and int8 beside fewer, which adds next to nothing to the
            error of the codes themselves (docs/design/attention-cpu.md).
        k_turns, turn_steps, k_weights: as the pages were written, see quantize_kv.

    Returns:
        out: (batch, num_heads, q_len, head_dim), dtype of q; 0 where a query sees nothing.
        lse: (batch, num_heads, q_len) float32, natural log-sum-exp; -inf where a query sees nothing.
        mass: (batch, num_kv_heads, num_tiers, max_pages * 64) float32, summed over the query group and the queries.
        window_mass: (batch, num_kv_heads, window_len) float32, likewise. Both are (0,) unless return_mass.

    Raises:
        RuntimeError: any argument. There are no checks in Python: this runs once per layer and token.
    """
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if k_window is None and v_window is None and window_positions is None:
        k_window = v_window = q.new_empty(q.shape[0], k_mean.shape[1], 0, q.shape[-1])
        window_positions = torch.empty(q.shape[0], 0, dtype=torch.int32, device=q.device)
    return _decode_attention(  # type: ignore[no-any-return]
        q,
        pools,
        block_table,
        cache_seqlens,
        k_mean,
        k_window,
        v_window,
        window_positions,
        _position(q_start, q),
        tier_bits,
        levels,
        softmax_scale,
        sliding_window,
        return_mass,
        precision,
        k_turns,
        turn_steps,
        k_weights,
    )


def attention_mass(
    q: Tensor,
    k: Tensor,
    k_positions: Tensor,
    q_start: Tensor | int,
    softmax_scale: float,
    sliding_window: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention probability that each key receives, summed over the queries and the query group. Never materialises
    the (q_len, kv_len) matrix.

    Args:
        q: (batch, num_heads, q_len, head_dim), float32, bfloat16 or float16, last dimension contiguous.
        k: (batch, num_kv_heads, n, head_dim), dtype of q, last dimension contiguous.
        k_positions: (batch, n) int32, -1: not a token, its values may be NaN.
        q_start, softmax_scale, sliding_window: as for decode_attention.
        lse: (batch, num_heads, q_len) float32, natural log, if the caller has it: saves one of the two passes.

    Returns:
        (batch, num_kv_heads, n) float32.

    Raises:
        RuntimeError: any argument.
    """
    start = _position(q_start, q)
    return _attention_mass(q, k, k_positions, start, softmax_scale, sliding_window, lse)  # type: ignore[no-any-return]


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention results over disjoint sets of keys into the result over their union (flash-decoding's reduction):
    ``lse = logsumexp_s lse_s``, ``o = sum_s exp(lse_s - lse) o_s``.

    Args:
        o: (num_states, ..., head_dim), float32, bfloat16 or float16.
        lse: (num_states, ...) float32, natural log; -inf: an empty state, whose o is ignored. NaN makes NaN of
            the result.

    Returns:
        o (..., head_dim) of o's dtype and lse (...) float32; 0 and -inf where all states are empty.

    Raises:
        RuntimeError: any argument.
    """
    return _merge_states(o, lse)  # type: ignore[no-any-return]
