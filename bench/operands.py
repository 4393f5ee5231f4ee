"""Random keys and values, and packed caches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smartkv_ext import ops
from smartkv_ext.reference.layout import PAGE_SIZE, TIERS, page_layout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tokens:
    """Arguments of quantize_kv for random bfloat16 tokens: diffuse attention, no outliers."""

    k: torch.Tensor  # (batch, num_kv_heads, n, head_dim) bfloat16, as v
    v: torch.Tensor
    mean: torch.Tensor  # (batch, num_kv_heads, head_dim) float32
    positions: torch.Tensor  # (batch, num_kv_heads, n) int32
    scores: torch.Tensor  # (batch, num_kv_heads, n) float32

    @classmethod
    def random(cls, batch: int, kv_heads: int, n: int, head_dim: int, device: torch.device = CPU) -> Tokens:
        """Standard normal keys and values at positions 0 to n - 1."""
        k, v = torch.randn(2, batch, kv_heads, n, head_dim, device=device).to(torch.bfloat16)
        positions = torch.arange(n, dtype=torch.int32, device=device).expand(batch, kv_heads, -1).contiguous()
        return cls(k, v, k.float().mean(2), positions, torch.rand(batch, kv_heads, n, device=device))

    def pages(self, bits: int) -> torch.Tensor:
        """(batch, num_kv_heads, ceil(n / 64), page_bytes) uint8."""
        return ops.quantize_kv(self.k, self.v, self.mean, self.positions, self.scores, bits)


@dataclass(frozen=True)
class Packed:
    """A paged cache as decode_attention, append_kv and compact_kv take it."""

    pools: list[torch.Tensor]  # per tier (num_pages, page_bytes) uint8
    block_table: torch.Tensor  # (batch, num_kv_heads, num_tiers, max_pages) int32
    lengths: torch.Tensor  # (batch, num_kv_heads, num_tiers) int32
    mean: torch.Tensor  # (batch, num_kv_heads, head_dim) float32
    tier_bits: list[int]
    q_start: int  # behind every position

    @property
    def num_bytes(self) -> int:
        """Of all pages."""
        return sum(pool.nbytes for pool in self.pools)


def uniform_cache(tokens: Tokens, bits: int) -> Packed:
    """All tokens in one tier, every head of the same length."""
    batch, kv_heads, n, _ = tokens.k.shape
    pages = tokens.pages(bits)
    table = torch.arange(batch * kv_heads * pages.shape[2], dtype=torch.int32).view(batch, kv_heads, 1, -1)
    lengths = torch.full((batch, kv_heads, 1), n, dtype=torch.int32)
    return Packed([pages.flatten(0, 2)], table, lengths, tokens.mean, [bits], n)


def ragged_page_counts(num_bytes: int, heads: int, page_bytes: Sequence[int]) -> torch.Tensor:
    """(heads, tiers) int64 pages that take ``num_bytes`` together, within one smallest page.

    Every tier gets the same share of the bytes; head i gets a share that grows evenly from 1 to 7.
    """
    share = torch.linspace(1, 7, heads, dtype=torch.float64)
    share = num_bytes * share / share.sum() / len(page_bytes)
    counts = (share[:, None] / torch.tensor(page_bytes, dtype=torch.float64)).floor().long()
    left = num_bytes - int((counts * torch.tensor(page_bytes)).sum())
    for tier in reversed(range(len(page_bytes))):  # what rounding left over: large pages first
        extra = left // page_bytes[tier]
        left -= extra * page_bytes[tier]
        counts[:, tier] += extra // heads
        counts[: extra % heads, tier] += 1
    return counts


def mixed_cache(
    num_bytes: int, batch: int, kv_heads: int, head_dim: int, tier_bits: Sequence[int] = TIERS,
    device: torch.device = CPU,
) -> Packed:  # fmt: skip
    """Ragged heads of one or several tiers in ``num_bytes`` of pages (ragged_page_counts), last pages partly filled."""
    heads = batch * kv_heads
    counts = ragged_page_counts(num_bytes, heads, [page_layout(bits, head_dim).page_bytes for bits in tier_bits])
    table = torch.full((heads, len(tier_bits), int(counts.max())), -1, dtype=torch.int32)
    pools = []
    for tier, bits in enumerate(tier_bits):
        total = int(counts[:, tier].sum())
        used = torch.arange(table.shape[2]) < counts[:, tier, None]
        table[:, tier][used] = torch.arange(total, dtype=torch.int32)
        tokens = Tokens.random(1, 1, max(total, 1) * PAGE_SIZE, head_dim, device)
        pools.append(tokens.pages(bits).flatten(0, 2)[:total])
    lengths = counts * PAGE_SIZE - torch.randint(PAGE_SIZE, counts.shape) * (counts > 0)
    return Packed(
        pools,
        table.view(batch, kv_heads, len(tier_bits), -1),
        lengths.int().view(batch, kv_heads, -1),
        torch.zeros(batch, kv_heads, head_dim, device=device),
        list(tier_bits),
        max(len(pool) for pool in pools) * PAGE_SIZE,
    )
