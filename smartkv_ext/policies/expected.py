"""expected_attention: what queries that have not come yet are going to attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Policy, TokenView

ALL_QUERIES = 1 << 30
NUM_SINKS = 4  # their queries are unlike the others and stay out of the statistics


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in halves, as Llama and Qwen do it: x (..., head_dim), cos and sin (..., head_dim / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Future queries are taken as Gaussian: ``q ~ N(mu, Sigma)`` before RoPE, then rotated by R, the mean rotation over
    the next ``n_future`` positions (Devoto et al. 2025, section 3):

    ``z_i = exp(k_i . R mu / sqrt(d) + k_i R Sigma R^T k_i / (2 d))``, ``a_i = z_i / sum_j z_j``, and
    ``score_i = (epsilon + mean over the query group of a_i) ||v_i||``.

    mu and Sigma come from all queries of the forward that packs (but those of the first four tokens). While decoding,
    our extension: they come from the newest ``decode_queries`` queries, and ``sum_j z_j`` stays what it was at the
    first packing (state "expected_lse", (batch, num_heads), float32), so that scores of old and new tokens compare.
    Records keep their score.
    """

    name: ClassVar[str] = "expected_attention"
    summary: ClassVar[str] = "attention that future queries would pay, times the value's norm"
    source: ClassVar[str] = "Devoto et al. 2025, Expected Attention: KV Cache Compression by Estimating Attention"
    prefill_queries: ClassVar[int] = ALL_QUERIES
    decode_queries: ClassVar[int] = 16
    compares_heads: ClassVar[bool] = True
    n_future: int = 512
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.n_future < 1:
            raise ValueError(f"n_future must be at least 1; got {self.n_future}")

    def score(self, view: TokenView) -> torch.Tensor:
        assert view.queries is not None, "the policy asks for queries, so the cache hands them over"
        batch, num_kv_heads, _, head_dim = view.keys.shape
        mean, covariance = self._future_queries(view)
        valid = (view.positions >= 0)[:, None, None]
        keys = view.keys.float().masked_fill(~valid.squeeze(1)[..., None], 0.0)[:, :, None]
        mean = mean.view(batch, num_kv_heads, -1, 1, head_dim)
        covariance = covariance.view(batch, num_kv_heads, -1, head_dim, head_dim)
        scale = view.softmax_scale
        logits = (keys * mean).sum(-1) * scale + ((keys @ covariance) * keys).sum(-1) * (scale**2 / 2)
        logits = logits.masked_fill(~valid, -torch.inf)
        if "expected_lse" not in view.state:
            view.state["expected_lse"] = logits.logsumexp(-1).flatten(1)
        lse = view.state["expected_lse"].view(batch, num_kv_heads, -1, 1)
        expected = (logits - lse).exp().mean(2)
        norms: torch.Tensor = torch.linalg.vector_norm(view.values.float(), dim=-1)
        return (self.epsilon + expected) * norms

    def _future_queries(self, view: TokenView) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (batch, num_heads, head_dim) and covariance (batch, num_heads, head_dim, head_dim) after rotation."""
        assert view.queries is not None
        head_dim = view.queries.shape[3]
        place = torch.arange(view.q_start, view.seen, device=view.queries.device)
        inv_freq = view.queries.new_zeros(head_dim // 2).float() if view.inv_freq is None else view.inv_freq
        inv_freq = inv_freq.to(place.device)
        back = -place[:, None] * inv_freq
        queries = rotate(view.queries.float(), back.cos(), back.sin())
        # Padding lies in front, so a row's own tokens are its newest; one query is used however short the row.
        first = (view.seen - view.row_tokens)[:, None] + NUM_SINKS
        used = ((place >= first) | (place == view.seen - 1))[:, None, :, None]
        weight = used.float() / used.sum(2, keepdim=True)
        mean = torch.where(used, queries * weight, 0.0).sum(2)
        centred = torch.where(used, queries - mean[:, :, None], 0.0)
        covariance = centred.transpose(2, 3) @ (centred * weight)
        ahead = (view.seen + torch.arange(self.n_future, device=place.device))[:, None] * inv_freq
        cos, sin = ahead.cos().mean(0), ahead.sin().mean(0)
        half = rotate(covariance, cos, sin)  # Sigma R^T: Sigma is symmetric
        return rotate(mean, cos, sin), rotate(half.transpose(2, 3), cos, sin)
