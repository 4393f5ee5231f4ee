"""Synthetic attention patterns: queries and keys whose attention has sinks, a recency bias, a few dense tokens and a
focus that grows with depth. Every number of the pattern is in ``Pattern``.

Real vectors, not a matrix of weights: policies that look at keys, values or queries run as they do in the cache.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from .reconstruction import Trace, make_trace

SPLITS = {"train": 1001, "valid": 2002, "test": 3003}  # seeds
HEAD_DIM = 64
HALF = HEAD_DIM // 2
IMPORTANCE, SINK, FIRST_NOISE = 5, 6, 7  # channels; channels below 5 and their partners hold the recency planes
PLANES = 5


@dataclass(frozen=True)
class Pattern:
    """What the attention is made of. Logits are in nats; ``focus`` multiplies all of them."""

    documents: int = 8
    layers: int = 8
    kv_heads: int = 2
    kv_groups: int = 2
    tokens: int = 512  # seen before eviction
    future: int = 128  # queries that judge it
    sinks: int = 4
    sink_logit: float = 3.0
    dense_share: float = 0.1
    dense_gain: float = 3.0  # times the attention of other tokens, at focus 1
    recency: float = 3.0  # newest against oldest, spread over five rotary planes
    noise: float = 1.0  # standard deviation of what a query likes in a key
    focus: float = 1.0  # logits of layer l are multiplied by 1 + focus * l / layers
    key_norm: float = 1.0  # of a key's noise part; its spread is log-normal and unrelated to importance
    key_norm_spread: float = 0.25


def inverse_frequencies(pattern: Pattern) -> torch.Tensor:
    """(HEAD_DIM / 2,) angle per position: half a turn over the whole text, then twice as fast per plane; 0: no turn."""
    out = torch.zeros(HALF)
    out[:PLANES] = math.pi / (pattern.tokens + pattern.future) * 2.0 ** torch.arange(PLANES)
    return out


def generate_vectors(split: str, layer: int, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (documents, heads, total, 64), keys and values (documents, kv_heads, total, 64) of a layer, float32.

    Every (split, layer) has its own generator, so the same seed gives the same bits whatever else is generated.
    """
    p, total = pattern, pattern.tokens + pattern.future
    generator = torch.Generator().manual_seed(SPLITS[split] * 1000 + layer)
    scale = HEAD_DIM**0.5  # attention divides logits by it

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    noise_channels = HEAD_DIM - PLANES - FIRST_NOISE
    keys = torch.zeros(p.documents, p.kv_heads, total, HEAD_DIM)
    queries = torch.zeros(p.documents, p.kv_heads * p.kv_groups, total, HEAD_DIM)
    noisy = [c for c in range(FIRST_NOISE, HEAD_DIM) if not HALF <= c < HALF + PLANES]
    norms = p.key_norm * (p.key_norm_spread * normal(p.documents, p.kv_heads, total, 1)).exp()
    keys[..., noisy] = normal(p.documents, p.kv_heads, total, noise_channels) / noise_channels**0.5 * norms
    queries[..., noisy] = normal(*queries.shape[:3], noise_channels) * (p.noise * scale / p.key_norm)

    dense = torch.rand(p.documents, 1, total, generator=generator) < p.dense_share  # tokens, so the same for all heads
    focus = 1 + p.focus * layer / p.layers
    # exp(x) of Gaussian x grows with its variance: without this, keys of large norm would draw more attention.
    lure = focus / 2 * (p.noise / p.key_norm) ** 2 * keys.square().sum(-1)
    keys[..., IMPORTANCE] = 0.5 * (dense.float() - lure / math.log(p.dense_gain))
    queries[..., IMPORTANCE] = 2 * math.log(p.dense_gain) * scale
    keys[:, :, : p.sinks, SINK] = 1.0
    queries[..., SINK] = p.sink_logit * scale

    angles = torch.arange(total)[:, None] * inverse_frequencies(p)[:PLANES]
    turned = torch.cat([angles.cos(), angles.sin()], -1)
    planes = [*range(PLANES), *range(HALF, HALF + PLANES)]
    keys[..., planes] = 0.5 * turned
    queries[..., planes] = 2 * p.recency / PLANES * scale * turned
    return focus * queries, keys, normal(p.documents, p.kv_heads, total, HEAD_DIM)


def generate_traces(split: str, pattern: Pattern | None = None) -> list[Trace]:
    """A trace per layer. Raises KeyError for a split other than train, valid, test."""
    p = pattern or Pattern()
    return [
        make_trace(
            *generate_vectors(split, layer, p), p.tokens, layer, p.layers, HEAD_DIM**-0.5, inverse_frequencies(p)
        )
        for layer in range(p.layers)
    ]


def digest(split: str, pattern: Pattern | None = None) -> str:
    """SHA-256 of every bit that is generated for a split."""
    out = hashlib.sha256()
    p = pattern or Pattern()
    for layer in range(p.layers):
        for x in generate_vectors(split, layer, p):
            out.update(x.numpy().tobytes())
    return out.hexdigest()
