"""Scores and decisions: gate_score, select_kv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library as _library  # registers the ops

_select_kv = torch.ops.smartkv.select_kv.default
_gate_score = torch.ops.smartkv.gate_score.default


def select_kv(
    scores: Tensor,
    current: Tensor,
    budgets: Tensor,
    page_bytes: Sequence[int],
    distortion: Sequence[float],
    evict_distortion: float = 1.0,
    zipf_offset: float = 64.0,
) -> Tensor:
    """Choose for each token to evict it or a tier, so that the pages of a group fit its budget.

    Tokens of all heads of a group are ranked together; rank r weighs ``1 / (r + zipf_offset)``. Whole pages are bought
    where weight x distortion removed / byte is greatest (greedy on the convex hull of the tiers; Shoham and Gersho,
    1988), then filled in rank order. Never raises a token above its present tier.

    Args:
        scores: (groups, heads, n) float32, higher = keep; -inf and NaN: not a candidate.
        current: (groups, heads, n) int8: present tier; num_tiers: still in full precision; -1: no token here.
        budgets: (groups,) int64, bytes of pages.
        page_bytes: per tier, ascending.
        distortion: per tier, what a token loses there, such as its relative squared error.
        evict_distortion: the same for an evicted token.
        zipf_offset: above 0; flattens the importance of the first ranks.

    Returns:
        (groups, heads, n) int8: tier, or -1: evict.

    Raises:
        RuntimeError: any argument.
    """
    return _select_kv(  # type: ignore[no-any-return]
        scores, current, budgets, page_bytes, distortion, evict_distortion, zipf_offset
    )


def gate_score(keys: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Score tokens by a small MLP per layer and head on their keys: linear, ReLU, (linear, ReLU,) linear.

    Args:
        keys: per layer (batch, num_kv_heads, n, head_dim), one dtype of float32, bfloat16, float16, last dimension
            contiguous.
        weights: 2 or 3 tensors (num_layers, num_kv_heads, out, in) float32; the last has out = 1.
        biases: as many (num_layers, num_kv_heads, out) float32.

    Returns:
        (num_layers, batch, num_kv_heads, n) float32, higher = keep.

    Raises:
        RuntimeError: any argument.
    """
    return _gate_score(keys, weights, biases)  # type: ignore[no-any-return]
