"""Page format v2: where every byte of a page of 64 token records lies (docs/design/page-format.md).

The pure-Python twin of ``csrc/include/smartkv/layout.h``; a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

PAGE_FORMAT_VERSION = 2
PAGE_SIZE = 64  # token records per page
# A tier is named by the bits of a value, or by 100 times those of keys plus those of values where the two differ: 302
# is K3V2. Ascending: no step up takes bits from keys or from values.
TIERS = (2, 302, 3, 403, 4, 8, 16)
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Bit planes of a code, low bits first: a 3-bit code is two low bits and one high bit.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def kv_bits(tier: int) -> tuple[int, int]:
    """Bits of keys and of values."""
    return (tier // 100, tier % 100) if tier > 100 else (tier, tier)


def tier_name(tier: int) -> str:
    """As people write it: "4", or "K3V2" for 302."""
    k_bits, v_bits = kv_bits(tier)
    return str(tier) if k_bits == v_bits else f"K{k_bits}V{v_bits}"


def plane_lanes(head_dim: int, width: int) -> int:
    """Bytes that one record occupies in a plane of ``width`` bits, padded to whole 4-channel groups."""
    return (head_dim * width // 8 + 3) // 4 * 4


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of the sections of one page. ``k_scale``/``v_scale`` are -1 in raw (16) pages."""

    tier: int
    k_bits: int
    v_bits: int
    head_dim: int
    itemsize: int  # bytes per value of the raw tier: 2 (bf16, fp16) or 4 (fp32); ignored in others
    k_codes: int
    v_codes: int
    k_scale: int  # float16 [64]
    v_scale: int  # float16 [64]
    position: int  # int32 [64], -1 in slots that were never written
    score: int  # bfloat16 [64]
    page_bytes: int

    def section(self, kind: str) -> slice:
        """Where the codes, or the plain values, of "k" or "v" lie."""
        end = self.k_scale if self.k_scale >= 0 else self.position
        return slice(self.k_codes, self.v_codes) if kind == "k" else slice(self.v_codes, end)

    def scales(self, kind: str) -> slice:
        """Where the float16 scales of "k" or "v" lie."""
        start = self.k_scale if kind == "k" else self.v_scale
        return slice(start, start + 2 * PAGE_SIZE)

    def bits(self, kind: str) -> int:
        """Of "k" or "v"."""
        return self.k_bits if kind == "k" else self.v_bits


@cache
def page_layout(tier: int, head_dim: int, itemsize: int = 2) -> PageLayout:
    """Sections in order: K codes, V codes, K scales, V scales, positions, scores."""
    check_format(tier, head_dim)
    k_bits, v_bits = kv_bits(tier)
    if tier == 16:
        k_codes = v_codes = PAGE_SIZE * head_dim * itemsize
        scales = 0
    else:
        k_codes, v_codes = (PAGE_SIZE * sum(plane_lanes(head_dim, w) for w in PLANES[b]) for b in (k_bits, v_bits))
        scales = PAGE_SIZE * 2
    k_scale = k_codes + v_codes
    position = k_scale + 2 * scales
    score = position + PAGE_SIZE * 4
    return PageLayout(
        tier=tier,
        k_bits=k_bits,
        v_bits=v_bits,
        head_dim=head_dim,
        itemsize=itemsize,
        k_codes=0,
        v_codes=k_codes,
        k_scale=k_scale if scales else -1,
        v_scale=k_scale + scales if scales else -1,
        position=position,
        score=score,
        page_bytes=score + PAGE_SIZE * 2,
    )


def check_format(tier: int, head_dim: int) -> None:
    """Raise ValueError for a tier or head_dim that no page can have."""
    if tier not in TIERS:
        raise ValueError(f"bits must be one of {', '.join(map(str, TIERS))}; got {tier}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}; got {head_dim}")


@cache
def plane_index(head_dim: int, width: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(byte offset in the plane (64, head_dim), bit shift (head_dim,)) of each code, for kind "k" or "v".

    Channel c lives in byte lane j = c % J with shift width * (c // J), J = plane_lanes. K: blocks of 16 tokens,
    4-channel groups inside; V: quads of 4 tokens, channels inside. So a 32-bit word holds 4 channels of one token
    (K) or 4 tokens of one channel (V), and 16 words make 16 scores, or 16 output channels, with no horizontal sum.
    """
    lanes = plane_lanes(head_dim, width)
    channel = torch.arange(head_dim)
    j, u = channel % lanes, channel // lanes
    s = torch.arange(PAGE_SIZE)[:, None]
    if kind == "k":
        offset = s // 16 * (16 * lanes) + j // 4 * 64 + s % 16 * 4 + j % 4
    else:
        offset = s // 4 * (4 * lanes) + j * 4 + s % 4
    return offset, u * width


def _planes(head_dim: int, bits: int, kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
    base = low = 0
    for width in PLANES[bits]:
        offset, shift = plane_index(head_dim, width, kind)
        yield base + offset, shift, width, low
        base += PAGE_SIZE * plane_lanes(head_dim, width)
        low += width


def pack_codes(codes: torch.Tensor, bits: int, kind: str) -> torch.Tensor:
    """codes (..., 64, head_dim) integer in [0, 2**bits) -> bytes (..., 64 * record bytes) uint8."""
    head_dim = codes.shape[-1]
    size = PAGE_SIZE * sum(plane_lanes(head_dim, w) for w in PLANES[bits])
    out = torch.zeros(*codes.shape[:-2], size, dtype=torch.int32, device=codes.device)
    for offset, shift, width, low in _planes(head_dim, bits, kind):
        part = ((codes.int() >> low) & ((1 << width) - 1)) << shift.to(codes.device)
        index = offset.flatten().to(codes.device).expand(*codes.shape[:-2], -1)
        out.scatter_add_(-1, index, part.flatten(-2).int())
    return out.to(torch.uint8)


def unpack_codes(packed: torch.Tensor, bits: int, head_dim: int, kind: str) -> torch.Tensor:
    """Inverse of pack_codes: bytes (..., 64 * record bytes) -> codes (..., 64, head_dim) int32."""
    codes = torch.zeros(*packed.shape[:-1], PAGE_SIZE, head_dim, dtype=torch.int32, device=packed.device)
    for offset, shift, width, low in _planes(head_dim, bits, kind):
        index = offset.flatten().to(packed.device).expand(*packed.shape[:-1], -1)
        word = packed.gather(-1, index).int().unflatten(-1, (PAGE_SIZE, head_dim))
        codes |= ((word >> shift.to(packed.device)) & ((1 << width) - 1)) << low
    return codes


def page_positions(pages: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """View of the positions of pages (..., page_bytes): (..., 64) int32."""
    return pages[..., layout.position : layout.score].view(torch.int32)


def page_scores(pages: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """View of the scores of pages (..., page_bytes): (..., 64) bfloat16."""
    return pages[..., layout.score : layout.page_bytes].view(torch.bfloat16)
