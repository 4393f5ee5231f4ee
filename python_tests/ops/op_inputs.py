"""Inputs and comparisons for the op tests: strided tensors, poisoned paged caches, page bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from smartkv_ext import reference
from smartkv_ext.reference.hadamard import rotate
from smartkv_ext.reference.layout import (
    PAGE_SIZE,
    PageLayout,
    page_layout,
    page_positions,
    unpack_codes,
)
from smartkv_ext.reference.levels import gaussian_unit, level_table
from smartkv_ext.reference.quantizer import decode
from smartkv_ext.reference.turns import key_shift

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 63, 64, 65, 130)
GARBAGE_PAGE = 2147480000


def strided(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Random (batch, heads, n, head_dim), a slice of a bigger NaN-filled tensor: only the last dimension is dense."""
    batch, heads, n, head_dim = shape
    big = torch.full((batch, n + 3, heads + 1, head_dim + 5), torch.nan, dtype=dtype)
    part = big[:, 1 : n + 1, :heads, 2 : head_dim + 2].transpose(1, 2)
    part.copy_(torch.randn(shape) * scale)
    return part


def tokens(
    batch: int, heads: int, n: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Arguments of quantize_kv for n tokens: keys with a strong mean, as models have."""
    k = strided(batch, heads, n, head_dim, dtype=dtype) + torch.randn(batch, heads, 1, head_dim).to(dtype) * 3
    return {
        "k": k,
        "v": strided(batch, heads, n, head_dim, dtype=dtype),
        "k_mean": k.float().mean(2) if n else torch.randn(batch, heads, head_dim),
        "positions": torch.arange(n, dtype=torch.int32).expand(batch, heads, n),
        "scores": torch.randn(heads, batch, n).transpose(0, 1),
    }


def turning(batch: int, heads: int, turns: int, head_dim: int) -> dict[str, torch.Tensor]:
    """k_turns, turn_steps and k_weights; a head may have fewer turns than the others."""
    vectors, steps = torch.randn(batch, heads, turns, 2, head_dim) * 3, torch.randint(2**32, (batch, heads, turns))
    if turns > 1:
        vectors[0, 0, -1], steps[0, 0, -1] = 0, 0
    weights = (torch.randn(batch, heads, head_dim) / 2).exp()
    return {"k_turns": vectors.half(), "turn_steps": (steps - 2**31).int(), "k_weights": weights}


def shift_of(k_mean: torch.Tensor, positions: torch.Tensor, turns: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, heads, n, head_dim) what keys at positions (batch, heads, n) lose."""
    return key_shift(k_mean, positions, turns.get("k_turns"), turns.get("turn_steps"))


@dataclass
class Paged:
    """A paged cache whose unused memory is poisoned, and the dense keys and values that it stands for."""

    pools: list[torch.Tensor]
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    k_mean: torch.Tensor
    tier_bits: tuple[int, ...]
    levels: str
    dtype: torch.dtype
    layouts: list[PageLayout]
    turns: dict[str, torch.Tensor] = field(default_factory=dict)  # as ``turning`` gives them, or nothing

    def clone(self) -> Paged:
        return Paged(
            [p.clone() for p in self.pools],
            self.block_table.clone(),
            self.cache_seqlens.clone(),
            self.k_mean,
            self.tier_bits,
            self.levels,
            self.dtype,
            self.layouts,
            self.turns,
        )

    def head_turns(self, b: int, h: int) -> dict[str, torch.Tensor]:
        """Those of one head, as a batch of one."""
        return {name: x[b : b + 1, h : h + 1] for name, x in self.turns.items()}

    def shift(self, b: int, h: int, positions: torch.Tensor) -> torch.Tensor:
        """(n, head_dim) what keys at positions (n,) lose."""
        return shift_of(self.k_mean[b : b + 1, h : h + 1], positions[None, None], self.head_turns(b, h))[0, 0]

    def pages(self, b: int, h: int, t: int) -> torch.Tensor:
        """(num_pages, page_bytes) of one list."""
        count = -(-int(self.cache_seqlens[b, h, t]) // PAGE_SIZE)
        return self.pools[t][self.block_table[b, h, t, :count].long()]

    def dense(self, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values (n, head_dim) float32 and positions (n,) of a head, tier after tier."""
        parts = []
        for t, bits in enumerate(self.tier_bits):
            n, pages = int(self.cache_seqlens[b, h, t]), self.pages(b, h, t)
            stored = self.dtype if bits == 16 else torch.float32
            k, v = reference.dequantize_kv(
                pages[None, None],
                self.k_mean[b : b + 1, h : h + 1],
                self.layouts[t].head_dim,
                bits,
                self.levels,
                stored,
                **self.head_turns(b, h),
            )
            parts.append(
                (k[0, 0, :n].float(), v[0, 0, :n].float(), page_positions(pages, self.layouts[t]).flatten()[:n])
            )
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def poison_slots(pages: torch.Tensor, layout: PageLayout, used: int, dtype: torch.dtype) -> None:
    """Slots from `used` on in pages (num_pages, page_bytes): NaN values at position 0, which every query could see."""
    index = torch.arange(used, len(pages) * PAGE_SIZE)
    page, slot = index // PAGE_SIZE, index % PAGE_SIZE
    page_positions(pages, layout)[page, slot] = 0
    if layout.tier == 16:
        for kind in "kv":
            pages[:, layout.section(kind)].view(dtype).unflatten(1, (PAGE_SIZE, -1))[page, slot] = torch.nan
        return
    for kind in "kv":
        pages[:, layout.scales(kind)].view(torch.float16)[page, slot] = torch.nan


def paged(
    tier_bits: tuple[int, ...],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    levels: str = "gaussian",
    batch: int = 2,
    heads: int = 2,
    sizes: tuple[int, ...] = SIZES,
    spare_pages: int = 2,
    turns: int = 0,
) -> Paged:
    """Lists of awkward lengths; positions of a head are a permutation of 0, 1, ... over its tiers."""
    rng = random.Random(0)
    num_tiers = len(tier_bits)
    seqlens = torch.tensor([rng.choice(sizes) for _ in range(batch * heads * num_tiers)], dtype=torch.int32)
    seqlens = seqlens.view(batch, heads, num_tiers)
    max_pages = -(-int(seqlens.max()) // PAGE_SIZE) + spare_pages
    layouts = [page_layout(bits, head_dim, dtype.itemsize) for bits in tier_bits]
    table = torch.full((batch, heads, num_tiers, max_pages), GARBAGE_PAGE, dtype=torch.int32)
    pools = [torch.full((batch * heads * max_pages + 3, x.page_bytes), 255, dtype=torch.uint8) for x in layouts]
    for pool, layout in zip(pools, layouts, strict=True):
        poison_slots(pool, layout, 0, dtype)
    k_mean = torch.randn(batch, heads, head_dim) * 3
    turning_mean = turning(batch, heads, turns, head_dim) if turns else {}
    cache = Paged(pools, table, seqlens, k_mean, tier_bits, levels, dtype, layouts, turning_mean)
    order = [torch.randperm(len(pool)) for pool in pools]
    for b in range(batch):
        for h in range(heads):
            total = int(seqlens[b, h].sum())
            positions = torch.randperm(total).int().split(seqlens[b, h].tolist())
            for t, bits in enumerate(tier_bits):
                n = int(seqlens[b, h, t])
                new = tokens(1, 1, n, head_dim, dtype)
                new["k"] = (cache.shift(b, h, positions[t]) + torch.randn(1, 1, n, head_dim)).to(dtype)
                new |= {"k_mean": k_mean[b : b + 1, h : h + 1], "positions": positions[t][None, None]}
                pages = reference.quantize_kv(**new, **cache.head_turns(b, h), bits=bits, levels=levels)[0, 0]
                if n:
                    poison_slots(pages, layouts[t], n, dtype)
                first = (b * heads + h) * max_pages
                ids = order[t][first : first + max_pages]
                table[b, h, t, : len(pages)] = ids[: len(pages)].int()
                pools[t][ids[: len(pages)]] = pages
    return cache


def give_pages(cache: Paged) -> None:
    """Replace the garbage in block_table by free pages, so that lists can grow."""
    for t, pool in enumerate(cache.pools):
        table = cache.block_table[:, :, t]
        free = [i for i in range(len(pool)) if not bool((table == i).any())]
        missing = table == GARBAGE_PAGE
        table[missing] = torch.tensor(free[: int(missing.sum())], dtype=torch.int32)


def near_midpoint(y: torch.Tensor, bits: int, levels: str) -> torch.Tensor:
    """Where the code of rotated values y (..., head_dim) is a toss-up between two neighbours: y / scale lies within
    float32 rounding (2e-5 of the largest level) of the midpoint between two levels."""
    y, table = y.double(), level_table(bits, levels).double()
    if bits == 8:
        scale = y.abs().amax(-1, keepdim=True) / 127
    elif levels == "uniform":
        scale = y.abs().amax(-1, keepdim=True) / (2**bits - 1)
    else:
        scale = y.square().mean(-1, keepdim=True).sqrt() * gaussian_unit(bits)
    middle = (table[1:] + table[:-1]) / 2
    x = y / scale.clamp(min=1e-30)
    above = torch.bucketize(x, middle)
    gap = torch.minimum(
        (x - middle[(above - 1).clamp(min=0)]).abs(), (x - middle[above.clamp(max=len(middle) - 1)]).abs()
    )
    return gap < 2e-5 * float(table[-1])


def rotated(k: torch.Tensor, v: torch.Tensor, k_mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the codes of tokens stand for."""
    return rotate(k.float() - k_mean[..., None, :]), rotate(v.float())


def rotated_pages(pages: torch.Tensor, layout: PageLayout, levels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, decoded from pages (..., page_bytes) with fewer than 16 bits: (..., 64, head_dim)."""
    out = []
    for kind in "kv":
        codes = unpack_codes(pages[..., layout.section(kind)], layout.bits(kind), layout.head_dim, kind)
        scale = pages[..., layout.scales(kind)].view(torch.float16)
        out.append(decode(codes, scale, layout.bits(kind), levels))
    return out[0], out[1]


def assert_same_records(
    ours: torch.Tensor,
    expected: torch.Tensor,
    layout: PageLayout,
    levels: str,
    y: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Pages (num_pages, page_bytes) are equal byte for byte, except that a code may be the neighbour where y (per kind
    (num_pages, 64, head_dim)) is at a midpoint, and that the fitted scale of such a record follows its codes.
    Elsewhere a scale may be the next float16, since its sum may be rounded in another order."""
    if torch.equal(ours, expected):
        return
    assert torch.equal(ours[:, layout.position :], expected[:, layout.position :]), "positions or scores differ"
    assert layout.tier != 16 and y is not None, "raw values differ"
    for kind, target in zip("kv", y, strict=True):
        bits = layout.bits(kind)
        a, b = (unpack_codes(x[:, layout.section(kind)], bits, layout.head_dim, kind) for x in (ours, expected))
        differs = a != b
        assert ((a - b).abs() <= 1).all(), f"{kind} codes differ by more than one"
        assert not (differs & ~near_midpoint(target, bits, levels)).any(), f"{kind} codes differ away from a midpoint"
        scales = [x[:, layout.scales(kind)].view(torch.float16) for x in (ours, expected)]
        steps = (scales[0].view(torch.int16).int() - scales[1].view(torch.int16).int()).abs()
        allowed = torch.where(differs.any(-1), 64, 1)
        assert (steps <= allowed).all(), f"{kind} scales differ by {int(steps.max())} float16 steps"


def assert_within_eager(
    ours: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, atol: float, name: str = "result"
) -> None:
    """Error of ours at most twice that of the plain computation in the same dtype, plus atol. Anomalies must
    coincide."""
    assert torch.equal(torch.isfinite(ours), torch.isfinite(exact)), f"{name}: anomalies differ"
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    error = (ours.double() - exact.double()).abs()[finite]
    bound = 2 * float((eager.double() - exact.double()).abs()[finite].max()) + atol
    worst = float(error.max())
    assert worst <= bound, f"{name}: error {worst:.3g} exceeds {bound:.3g}"
