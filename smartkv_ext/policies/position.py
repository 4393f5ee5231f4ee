"""Policies that look at positions alone: full, sliding_window, streaming_llm, random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Policy, RecordView, TokenView


def recency(view: TokenView) -> torch.Tensor:
    """(batch, num_kv_heads, n) float32: the token's logical index, so that the newest ranks highest."""
    return view.positions[:, None].float().expand(view.keys.shape[:3])


@dataclass(frozen=True)
class Full(Policy):
    """Keep every token; under a budget, newer ones at more bits. A fraction that could not hold them at the lowest tier
    is refused; where bytes no longer do, the oldest go, with a warning."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "keep every token, the budget only chooses its bits"
    source: ClassVar[str] = "-"
    evicts: ClassVar[bool] = False

    def score(self, view: TokenView) -> torch.Tensor:
        return recency(view)


@dataclass(frozen=True)
class SlidingWindow(Policy):
    """The newest tokens that the budget can hold, and nothing else: no sinks."""

    name: ClassVar[str] = "sliding_window"
    summary: ClassVar[str] = "newest tokens only, no sinks"
    source: ClassVar[str] = "Beltagy et al. 2020, Longformer"
    keeps_sinks: ClassVar[bool] = False

    def score(self, view: TokenView) -> torch.Tensor:
        return recency(view)


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Sinks (kept by the cache) and the newest tokens that the budget can hold; of those, at most ``recent``.

    With ``recent`` no larger than the cache's window nothing is ever packed: a streaming head (Xiao et al. 2024b).
    """

    name: ClassVar[str] = "streaming_llm"
    summary: ClassVar[str] = "sinks and newest tokens"
    source: ClassVar[str] = "Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks"
    recent: int | None = None  # None: as many as the budget holds

    def __post_init__(self) -> None:
        if self.recent is not None and self.recent < 1:
            raise ValueError(f"recent must be at least 1, or None; got {self.recent}")

    def score(self, view: TokenView) -> torch.Tensor:
        return self._limited(recency(view), view.seen)

    def refresh(self, records: RecordView) -> torch.Tensor:
        return self._limited(records.positions.float(), records.seen)

    def _limited(self, positions: torch.Tensor, seen: int) -> torch.Tensor:
        return positions if self.recent is None else positions.masked_fill(positions < seen - self.recent, -torch.inf)


@dataclass(frozen=True)
class Random(Policy):
    """A hash of (seed, layer, KV head, position): uniform in [0, 1), the same however the tokens were grouped or
    sharded."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "a hash of the position: the baseline"
    source: ClassVar[str] = "-"
    seed: int = 0

    def score(self, view: TokenView) -> torch.Tensor:
        heads = view.head_offset + torch.arange(view.keys.shape[1], device=view.positions.device)
        x = view.positions[:, None].long() + (heads[:, None] + 1) * 0x9E3779B1
        x = x + (view.layer_idx + 1) * 0x85EBCA77 + self.seed * 0xC2B2AE3D
        for shift in (16, 13, 16):  # xorshift-multiply mixing, in the 32 low bits
            x = ((x ^ (x >> shift)) * 0x45D9F3B) & 0xFFFFFFFF
        return (x >> 8).float() / 2**24
