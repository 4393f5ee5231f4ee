"""Ops that write and read pages: quantize_kv, dequantize_kv, append_kv, compact_kv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library as _library  # registers the ops
from ._checks import check_dtype, check_format, check_levels, check_tensor

_quantize_kv = torch.ops.smartkv.quantize_kv.default
_dequantize_kv = torch.ops.smartkv.dequantize_kv.default
_append_kv = torch.ops.smartkv.append_kv.default
_compact_kv = torch.ops.smartkv.compact_kv.default


def quantize_kv(
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    positions: Tensor,
    scores: Tensor,
    bits: int,
    levels: str = "gaussian",
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> Tensor:
    """Encode tokens into whole pages of one tier (docs/design/page-format.md).

    A key loses its head's mean key, part of which may turn with the position: ``k_mean`` + sum over the turns of
    cos(a) U + sin(a) V, a = 2 pi position step / 2^32. Then key and value are rotated by an orthonormal Hadamard
    matrix, and each becomes codes of ``bits`` bits and one float16 scale; 16 bits store the values as they are.

    Args:
        k, v: (batch, num_kv_heads, n, head_dim), float32, bfloat16 or float16; any strides but a contiguous last
            dimension. head_dim is 64, 80, 96, 128 or 256.
        k_mean: (batch, num_kv_heads, head_dim), float32.
        positions: (batch, num_kv_heads, n), int32, logical indices of the tokens.
        scores: (batch, num_kv_heads, n), float32, higher = keep; stored as bfloat16.
        bits: the tier: 2, 3, 4, 8 or 16, or 302 (K3V2: keys 3, values 2 bits) or 403 (K4V3).
        levels: "gaussian" (Lloyd-Max levels, scales that keep the norm of keys and do not shorten values) or "uniform".
        k_turns: (batch, num_kv_heads, turns, 2, head_dim), float16, U and V of up to 8 turns; given with turn_steps
            or not at all. A head with fewer fills up with zeros.
        turn_steps: (batch, num_kv_heads, turns), int32, the bits of a uint32: steps in 2^-32 turns per position.
        k_weights: (batch, num_kv_heads, head_dim), float32, not zero: what the mean leaves of a key is multiplied by
            them before it is rotated, and queries are divided by them. None: ones.

    Returns:
        (batch, num_kv_heads, ceil(n / 64), page_bytes) uint8. Slots after the last token have position -1.

    Raises:
        ValueError, TypeError: bits, levels, or the head_dim or type of k.
        RuntimeError: any other argument.
    """
    check_tensor(k, "k", 4)
    check_dtype(k.dtype, "k.dtype")
    check_format(bits, k.shape[-1])
    check_levels(levels)
    return _quantize_kv(  # type: ignore[no-any-return]
        k, v, k_mean, positions, scores, bits, levels, k_turns, turn_steps, k_weights
    )


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
    """Decode whole pages of one tier; slots never written: the mean key of position -1 (16 bits: zero)
    and a zero value.

    Args:
        pages: (batch, num_kv_heads, num_pages, page_bytes) uint8, as quantize_kv returns or gathered from a pool.
        k_mean, k_turns, turn_steps, k_weights: as for quantize_kv.
        head_dim, bits, levels: as the pages were written.
        dtype: of the result; for 16 bits it must be the dtype of the stored values.

    Returns:
        k, v: (batch, num_kv_heads, num_pages * 64, head_dim) of dtype.

    Raises:
        ValueError, TypeError: head_dim, bits, levels, dtype.
        RuntimeError: any other argument.
    """
    check_format(bits, head_dim)
    check_levels(levels)
    check_dtype(dtype, "dtype")
    return _dequantize_kv(  # type: ignore[no-any-return]
        pages, k_mean, head_dim, bits, levels, dtype, k_turns, turn_steps, k_weights
    )


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
    levels: str = "gaussian",
    k_turns: Tensor | None = None,
    turn_steps: Tensor | None = None,
    k_weights: Tensor | None = None,
) -> None:
    """Encode tokens, each into its own tier, behind what the lists of a paged cache hold.

    A list is the records of one (sequence, head, tier): record i lies in slot i % 64 of page block_table[..., i // 64].
    Mutates ``pools`` and ``cache_seqlens``. Two lists must not share a page.

    Args:
        pools: per tier (num_pages, page_bytes) uint8, contiguous, 64-byte aligned.
        block_table: (batch, num_kv_heads, num_tiers, max_pages) int32; must already hold the pages that are needed.
        cache_seqlens: (batch, num_kv_heads, num_tiers) int32, contiguous; advanced.
        k, v, k_mean, positions, scores, k_turns, turn_steps, k_weights: as for quantize_kv.
        tiers: (batch, num_kv_heads, n) int8, index into tier_bits, -1: skip the token.
        tier_bits: ascending, of 2, 302 (K3V2), 3, 403 (K4V3), 4, 8 and 16.
        levels: "gaussian" or "uniform".

    Raises:
        ValueError: levels.
        RuntimeError: any other argument, a full block_table and page ids outside the pool included.
    """
    check_levels(levels)
    _append_kv(
        pools, block_table, cache_seqlens, k, v, k_mean, positions, scores, tiers, tier_bits, levels, k_turns,
        turn_steps, k_weights,
    )  # fmt: skip


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
    """Evict and demote records in place, and close the holes: afterwards each list is dense again.

    Within a tier the highest survivors move into the lowest holes; then demoted records are re-encoded and appended,
    from the highest tier down. Positions and scores travel with the records. Mutates ``pools`` and ``cache_seqlens``.

    Args:
        pools, block_table, cache_seqlens, tier_bits, levels: as for append_kv; block_table needs the pages that a list
            has now and those that it will have.
        targets: (batch, num_kv_heads, num_tiers, max_pages * 64) int8: tier of each record, not above its present one,
            or -1: evict. Entries behind a list's length are ignored.
        k_mean, k_turns, turn_steps, k_weights: as for quantize_kv; they count when a 16-bit record is demoted.
        dtype: of the values in 16-bit pages.

    Raises:
        ValueError, TypeError: levels, dtype.
        RuntimeError: any other argument.
    """
    check_levels(levels)
    check_dtype(dtype, "dtype")
    _compact_kv(
        pools, block_table, cache_seqlens, targets, k_mean, tier_bits, levels, dtype, k_turns, turn_steps, k_weights
    )
