"""Policies that look at the attention that the newest queries pay: snapkv, pyramidkv, tova."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from smartkv_ext import ops

from .base import Policy, RecordView, TokenView


def received_attention(view: TokenView, newest: int) -> tuple[torch.Tensor, int]:
    """Mass (batch, num_kv_heads, n) that the ``newest`` queries pay to each token, summed over query group and queries.

    Also returns how many queries that were.
    """
    assert view.queries is not None, "the policy asks for queries, so the cache hands them over"
    queries = view.queries[:, :, -newest:]
    q_len = queries.shape[2]
    lse = None if view.lse is None else view.lse[:, :, -newest:].contiguous()
    start = view.q_start + view.queries.shape[2] - q_len
    mass = ops.attention_mass(queries, view.keys, view.positions, start, view.softmax_scale, view.sliding_window, lse)
    return mass, q_len


@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention from the last queries, max-pooled along the sequence (Li et al. 2024, section 4).

    The paper compresses a prompt once. While decoding, our extension: the newest ``decode_queries`` queries are the
    observation window, and a packed record's score is the larger of what it receives now and its old score times
    ``decay``.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "attention of the newest queries, max-pooled"
    source: ClassVar[str] = "Li et al. 2024, SnapKV: LLM Knows What You Are Looking for Before Generation"
    compares_heads: ClassVar[bool] = True
    prefill_queries: ClassVar[int] = 32
    decode_queries: ClassVar[int] = 8
    kernel_size: int = 5
    decay: float = 0.9

    def score(self, view: TokenView) -> torch.Tensor:
        mass, q_len = received_attention(view, self.prefill_queries)
        # Sinks lie beside the window but far away in the text: their mass must not be pooled into its oldest tokens.
        jump = F.pad(view.positions.diff(dim=1) > 1, (0, 1)) & (view.positions >= 0)
        before = jump.flip(1).cumsum(1).flip(1) > 0
        mass = mass.masked_fill(before[:, None], 0.0)
        pooled = F.max_pool1d(mass.flatten(0, 1), self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.view_as(mass) / q_len

    def refresh(self, records: RecordView) -> torch.Tensor:
        assert records.mass is not None, "the policy remembers queries, so the cache runs them over the records"
        return torch.maximum(self.decay * records.stored, records.mass / records.num_queries)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores under layer-wise budgets that fall from the first layer to the last (Cai et al. 2024, 4.2).

    Beside the recent tokens, which every layer keeps, the last of L layers gets 1 / beta of the mean budget, the first
    2 - 1 / beta, and those between lie on the line: ``k_l = k_0 - (k_0 - k_(L-1)) l / (L - 1)``. Here k counts bytes of
    pages. Scope "global" keeps the same records in all layers, so there every layer's share is even.
    """

    name: ClassVar[str] = "pyramidkv"
    summary: ClassVar[str] = "as snapkv, with more bytes for the lower layers"
    source: ClassVar[str] = "Cai et al. 2024, PyramidKV: Dynamic KV Cache Compression based on Pyramidal Funneling"
    beta: float = 20.0  # the paper's default

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1; got {self.beta}")

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        if num_layers == 1:
            return 1.0
        last = 1 / self.beta
        first = 2 - last
        return first - (first - last) * layer_idx / (num_layers - 1)


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the newest query alone, averaged over all heads of the layer (Oren et al. 2024, section 3.2)."""

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "attention of the newest query, mean over heads"
    source: ClassVar[str] = "Oren et al. 2024, Transformers are Multi-State RNNs"
    compares_heads: ClassVar[bool] = True
    prefill_queries: ClassVar[int] = 1
    decode_queries: ClassVar[int] = 1

    def score(self, view: TokenView) -> torch.Tensor:
        mass, _ = received_attention(view, 1)
        return mass.mean(1, keepdim=True).expand_as(mass)

    def refresh(self, records: RecordView) -> torch.Tensor:
        # Heads hold different records in different slots, so old records are judged by their own head's attention.
        assert records.mass is not None, "the policy remembers queries, so the cache runs them over the records"
        return records.mass
