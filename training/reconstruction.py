"""Attention reconstruction error: how much of the attention to come goes to tokens that a policy would evict now.

error = attention that the next queries pay to evicted tokens / to all tokens present at eviction

0 is perfect, 1 - retention is what a random choice gets. Averaged over documents, layers and KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smartkv_ext import ops
from smartkv_ext.policies import Policy, TokenView
from smartkv_ext.policies.features import RECENT_QUERIES

RETENTIONS = (0.25, 0.5, 0.75)
NUM_SINKS = 4


@dataclass
class Trace:
    """One layer of a batch of documents: what a policy sees after ``n`` tokens, and what is attended to afterwards."""

    view: TokenView
    future: torch.Tensor  # (batch, num_kv_heads, n) float32 attention from the queries that follow


def make_trace(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: int, layer_idx: int, num_layers: int,
    softmax_scale: float, inv_freq: torch.Tensor | None,
) -> Trace:  # fmt: skip
    """Trace at the moment when ``tokens`` of the tokens have been seen; the others are the future.

    queries (batch, num_heads, total, head_dim); keys, values (batch, num_kv_heads, total, head_dim), after RoPE.
    """
    batch, _, total, _ = queries.shape
    positions = torch.arange(total, dtype=torch.int32).expand(batch, -1).contiguous()
    past, seen = keys[:, :, :tokens].contiguous(), positions[:, :tokens].contiguous()

    def mass(begin: int, end: int, k: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return ops.attention_mass(queries[:, :, begin:end], k, where, begin, softmax_scale)

    newest = max(tokens - RECENT_QUERIES, 0)
    recent = mass(newest, tokens, past, seen)
    received = recent + mass(0, newest, past, seen) if newest else recent
    future = mass(tokens, total, keys, positions)[:, :, :tokens]
    view = TokenView(
        layer_idx=layer_idx, num_layers=num_layers, keys=past, values=values[:, :, :tokens], pre_rope_keys=None,
        positions=seen, queries=queries[:, :, :tokens], lse=None, q_start=0, softmax_scale=softmax_scale,
        sliding_window=0, head_offset=0, state={}, row_tokens=torch.full((batch,), tokens), received=received,
        recent=recent, inv_freq=inv_freq,
    )  # fmt: skip
    return Trace(view, future)


def protected(scores: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """``scores`` (..., n) with the first ``sinks`` and the newest ``window`` tokens above all others."""
    place = torch.arange(scores.shape[-1], device=scores.device)
    safe = (place < sinks) | (place >= scores.shape[-1] - window)
    return scores.masked_fill(safe, torch.inf)


def error_curve(scores: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
    """scores, future (..., n) -> (..., n + 1): share of the future attention that is lost when the best 0, 1, ..., n
    tokens stay. Ties go to the newer token; a score of -inf or NaN is lost in any case.
    """
    order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flip(-1)
    order = order.argsort(dim=-1, descending=True, stable=True)
    wanted = torch.where(scores > -torch.inf, future, 0.0).flip(-1).double().gather(-1, order)
    kept = torch.nn.functional.pad(wanted.cumsum(-1), (1, 0))
    return (1 - kept / future.double().sum(-1, keepdim=True)).float()


def layer_counts(policy: Policy, traces: Sequence[Trace], retention: float, least: int = 0) -> list[float]:
    """Tokens that each head of each layer may keep, at least ``least``. What a layer cannot use, or must not give
    away, is shared by the others in proportion.
    """
    num_layers, n = len(traces), traces[0].future.shape[-1]
    heads = traces[0].future.shape[1]
    shares = [policy.layer_share(i, num_layers, heads) for i in range(num_layers)]
    low, high = 0.0, 1e6
    for _ in range(60):  # bisection: the total grows with the factor
        factor = (low + high) / 2
        counts = [min(max(factor * share * n, least), n) for share in shares]
        low, high = (factor, high) if sum(counts) < retention * num_layers * n else (low, factor)
    return counts


def reconstruction_errors(
    policy: Policy, traces: Sequence[Trace], retentions: Sequence[float] = RETENTIONS, window: int = 4,
    shared: bool = False,
) -> list[float]:  # fmt: skip
    """Mean error of a policy at each retention, sinks and the newest ``window`` tokens kept.

    ``shared``: the heads of a layer compete for its tokens, as in the cache for policies that compare heads; otherwise
    every head keeps as many.
    """
    sums = [0.0] * len(retentions)
    sinks = NUM_SINKS if policy.keeps_sinks else 0
    counts = [layer_counts(policy, traces, r, window + sinks) for r in retentions]
    for i, trace in enumerate(traces):
        trace.view.state.clear()
        scores = protected(policy.score(trace.view), window, sinks)
        curve = None if shared else error_curve(scores, trace.future)
        for j, per_layer in enumerate(counts):
            keep = round(per_layer[i])
            if curve is not None:
                sums[j] += curve[..., keep].mean().item()
            else:
                sums[j] += _shared_error(scores, trace.future, keep, policy.head_floor)
    return [x / len(traces) for x in sums]


def _shared_error(scores: torch.Tensor, future: torch.Tensor, keep: int, floor: float) -> float:
    """Mean error over heads when the best keep * heads tokens of a layer stay, floor * keep of each head anyway. As in
    ``error_curve``, a score of -inf or NaN is lost in any case.
    """
    batch, heads, n = scores.shape
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    scores = torch.where(place < floor * keep, torch.inf, scores)
    best = scores.flatten(1).topk(min(keep * heads, heads * n), -1).indices
    kept = torch.zeros(batch, heads * n, dtype=torch.bool).scatter_(1, best, True).view(batch, heads, n)
    kept &= scores > -torch.inf
    lost = torch.where(kept, 0.0, future).sum(-1) / future.sum(-1)
    return lost.mean().item()
