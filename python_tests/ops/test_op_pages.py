"""quantize_kv, dequantize_kv, append_kv and compact_kv against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import (
    DTYPES,
    HEAD_DIMS,
    SIZES,
    Paged,
    assert_same_records,
    assert_within_eager,
    give_pages,
    paged,
    rotated,
    rotated_pages,
    tokens,
)

from smartkv_ext import ops, reference
from smartkv_ext.reference.layout import PAGE_SIZE, TIERS, page_layout, page_positions, page_scores

TIER_SETS = (TIERS, (2, 3, 4, 8, 16), (302, 403), (3, 8), (4,))


def in_pages(x: torch.Tensor) -> torch.Tensor:
    """(batch, heads, n, head_dim) -> (batch * heads * num_pages, 64, head_dim), zero-padded."""
    pad = -x.shape[2] % PAGE_SIZE
    return torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, PAGE_SIZE)).flatten(0, 2)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantize(head_dim: int, bits: int, n: int) -> None:
    dtype = DTYPES[n % 3]
    for levels in ("gaussian", "uniform"):
        args = tokens(2, 3, n, head_dim, dtype)
        ours = ops.quantize_kv(**args, bits=bits, levels=levels)
        expected = reference.quantize_kv(**args, bits=bits, levels=levels)
        assert ours.shape == expected.shape
        if n == 0:
            continue
        layout = page_layout(bits, head_dim, dtype.itemsize)
        y = tuple(in_pages(x) for x in rotated(args["k"], args["v"], args["k_mean"]))
        assert_same_records(ours.flatten(0, 2), expected.flatten(0, 2), layout, levels, y)


def test_quantize_extremes() -> None:
    """Zeros, huge and tiny vectors: scales saturate at the largest float16 and never become NaN."""
    args = tokens(1, 1, 6, 64)
    args["k_mean"] = torch.zeros(1, 1, 64)
    for row, scale in enumerate((0.0, 1e-30, 1e-6, 1e4, 1e9, 1e18)):
        args["k"][0, 0, row] = torch.randn(64) * scale
        args["v"][0, 0, row] = torch.randn(64) * scale
    for bits in TIERS[:-1]:
        for levels in ("gaussian", "uniform"):
            ours = ops.quantize_kv(**args, bits=bits, levels=levels)
            expected = reference.quantize_kv(**args, bits=bits, levels=levels)
            layout = page_layout(bits, 64)
            y = tuple(in_pages(x) for x in rotated(args["k"], args["v"], args["k_mean"]))
            assert_same_records(ours.flatten(0, 2), expected.flatten(0, 2), layout, levels, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dequantize(head_dim: int, bits: int, dtype: torch.dtype) -> None:
    for levels in ("gaussian", "uniform"):
        args = tokens(2, 2, 70, head_dim, dtype)
        pages = reference.quantize_kv(**args, bits=bits, levels=levels)
        got = ops.dequantize_kv(pages, args["k_mean"], head_dim, bits, levels, dtype)
        eager = reference.dequantize_kv(pages, args["k_mean"], head_dim, bits, levels, dtype)
        exact = reference.dequantize_kv(
            pages, args["k_mean"], head_dim, bits, levels, dtype if bits == 16 else torch.float32
        )
        for ours, plain, true in zip(got, eager, exact, strict=True):
            assert ours.dtype == dtype and ours.shape == (2, 2, 128, head_dim)
            assert_within_eager(ours, true, plain, atol=3e-6)


def test_dequantize_accepts_gathered_pages_and_none() -> None:
    args = tokens(1, 2, 130, 64)
    pages = ops.quantize_kv(**args, bits=4)
    mean = args["k_mean"]
    whole = ops.dequantize_kv(pages, mean, 64, 4, "gaussian", torch.float32)[0]
    some = ops.dequantize_kv(pages[:, :, ::2], mean, 64, 4, "gaussian", torch.float32)[0]
    assert torch.equal(some, torch.cat([whole[:, :, :64], whole[:, :, 128:]], 2))
    assert ops.dequantize_kv(pages[:, :, :0], mean, 64, 4, "gaussian", torch.float32)[1].shape == (1, 2, 0, 64)


def sources(cache: Paged) -> list[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Per (sequence, head): position -> what a demotion of that record encodes."""
    out = []
    for b in range(cache.block_table.shape[0]):
        for h in range(cache.block_table.shape[1]):
            found = {}
            for t, bits in enumerate(cache.tier_bits):
                n, pages, layout = int(cache.cache_seqlens[b, h, t]), cache.pages(b, h, t), cache.layouts[t]
                at = page_positions(pages, layout).flatten()
                if bits == 16:
                    k = pages[:, layout.section("k")].view(cache.dtype).reshape(-1, layout.head_dim)
                    v = pages[:, layout.section("v")].view(cache.dtype).reshape(-1, layout.head_dim)
                    own = k.float() - cache.shift(b, h, at)
                    if cache.turns:
                        own = own * cache.turns["k_weights"][b, h]
                    yk, yv = rotated(own, v, torch.zeros(layout.head_dim))
                else:
                    yk, yv = (x.flatten(0, 1) for x in rotated_pages(pages, layout, cache.levels))
                for i, position in enumerate(at[:n].tolist()):
                    found[position] = (yk[i], yv[i])
            out.append(found)
    return out


def assert_same_cache(ours: Paged, expected: Paged, y: list[dict[int, tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """All lists hold the same records, and nothing else of the pools was touched."""
    assert torch.equal(ours.cache_seqlens, expected.cache_seqlens)
    assert torch.equal(ours.block_table, expected.block_table)
    heads = ours.block_table.shape[1]
    for t, layout in enumerate(ours.layouts):
        differs = (ours.pools[t] != expected.pools[t]).any(-1)
        for b in range(ours.block_table.shape[0]):
            for h in range(heads):
                ids = ours.block_table[b, h, t, : -(-int(ours.cache_seqlens[b, h, t]) // PAGE_SIZE)].long()
                if differs[ids].any():
                    at = page_positions(expected.pools[t][ids], layout).flatten().tolist()
                    zero = (torch.zeros(layout.head_dim),) * 2
                    pairs = [y[b * heads + h].get(p, zero) for p in at]
                    want = tuple(torch.stack(x).unflatten(0, (-1, PAGE_SIZE)) for x in zip(*pairs, strict=True))
                    assert_same_records(ours.pools[t][ids], expected.pools[t][ids], layout, ours.levels, want)
                differs[ids] = False
        assert not differs.any(), f"pages outside the lists of tier {t} were written"


@pytest.mark.parametrize("n", (0, 1, 65))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_append(head_dim: int, dtype: torch.dtype, n: int) -> None:
    tier_bits, levels = TIER_SETS[n % len(TIER_SETS)], ("gaussian", "uniform")[n % 2]
    cache = paged(tier_bits, head_dim, dtype, levels, sizes=(0, 1, 63, 64))
    give_pages(cache)
    new = tokens(2, 2, n, head_dim, dtype) | {"k_mean": cache.k_mean}
    new["positions"] = new["positions"] + 1000
    tiers = torch.randint(-1, len(tier_bits), (2, n, 2)).to(torch.int8).transpose(1, 2)
    y = sources(cache)
    yk, yv = rotated(new["k"], new["v"], cache.k_mean)
    for b in range(2):
        for h in range(2):
            y[b * 2 + h] |= {1000 + i: (yk[b, h, i], yv[b, h, i]) for i in range(n)}
    ours, expected = cache.clone(), cache.clone()
    for module, into in ((ops, ours), (reference, expected)):
        module.append_kv(
            into.pools, into.block_table, into.cache_seqlens, **new, tiers=tiers, tier_bits=tier_bits, levels=levels
        )
    assert_same_cache(ours, expected, y)


def test_append_of_one_token_matches_append_of_many() -> None:
    cache = paged((2, 4, 16), 64, sizes=(0, 1, 63))
    give_pages(cache)
    new = tokens(2, 2, 9, 64) | {"k_mean": cache.k_mean}
    tiers = torch.randint(-1, 3, (2, 2, 9)).to(torch.int8)
    at_once, one_by_one = cache.clone(), cache.clone()
    ops.append_kv(at_once.pools, at_once.block_table, at_once.cache_seqlens, **new, tiers=tiers, tier_bits=(2, 4, 16))
    for i in range(9):
        part = {name: x if name == "k_mean" else x[:, :, i : i + 1] for name, x in new.items()}
        ops.append_kv(
            one_by_one.pools, one_by_one.block_table, one_by_one.cache_seqlens, **part,
            tiers=tiers[:, :, i : i + 1], tier_bits=(2, 4, 16),
        )  # fmt: skip
    assert_same_cache(at_once, one_by_one, [])


def random_targets(cache: Paged, evict: float = 0.3) -> torch.Tensor:
    """Mostly keep, sometimes evict, sometimes demote; garbage behind the lists."""
    num_tiers, slots = len(cache.tier_bits), cache.block_table.shape[3] * PAGE_SIZE
    shape = (*cache.block_table.shape[:2], num_tiers, slots)
    present = torch.arange(num_tiers).view(1, 1, -1, 1).expand(shape)
    lower = (torch.rand(shape) * (present + 1)).long()
    targets = torch.where(torch.rand(shape) < 0.5, present, lower)
    targets = torch.where(torch.rand(shape) < evict, -1, targets)
    used = torch.arange(slots) < cache.cache_seqlens[..., None]
    return torch.where(used, targets, 99).to(torch.int8)


def compact(module: object, cache: Paged, targets: torch.Tensor) -> None:
    module.compact_kv(
        cache.pools,
        cache.block_table,
        cache.cache_seqlens,
        targets,
        cache.k_mean,
        cache.tier_bits,
        cache.levels,
        cache.dtype,
        **cache.turns,
    )


@pytest.mark.parametrize("tier_bits", TIER_SETS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_compact(head_dim: int, tier_bits: tuple[int, ...]) -> None:
    dtype = DTYPES[(head_dim + len(tier_bits)) % 3]
    levels = ("gaussian", "uniform")[head_dim // 16 % 2]
    cache = paged(tier_bits, head_dim, dtype, levels, sizes=(0, 1, 64, 65), spare_pages=3)
    give_pages(cache)
    targets = random_targets(cache)
    ours, expected = cache.clone(), cache.clone()
    compact(ops, ours, targets)
    compact(reference, expected, targets)
    assert_same_cache(ours, expected, sources(cache))


def records(cache: Paged) -> list[tuple[int, ...]]:
    """(sequence, head, tier, position, score bits) of all records, sorted."""
    out = []
    for b in range(cache.block_table.shape[0]):
        for h in range(cache.block_table.shape[1]):
            for t, layout in enumerate(cache.layouts):
                n, pages = int(cache.cache_seqlens[b, h, t]), cache.pages(b, h, t)
                scores = page_scores(pages, layout).reshape(-1).view(torch.int16)[:n].tolist()
                positions = page_positions(pages, layout).flatten()[:n].tolist()
                out += [(b, h, t, p, s) for p, s in zip(positions, scores, strict=True)]
    return sorted(out)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), evict=st.floats(0, 1))
def test_compact_keeps_the_multiset_of_survivors(seed: int, evict: float) -> None:
    """Each record ends in the tier that was asked for, with its position and score, and none appears from nowhere."""
    torch.manual_seed(seed)
    cache = paged((2, 4, 16), 64, sizes=(0, 1, 64, 130), spare_pages=5)
    give_pages(cache)
    targets = random_targets(cache, evict)
    expected = []
    for b in range(2):
        for h in range(2):
            for t, layout in enumerate(cache.layouts):
                n, pages = int(cache.cache_seqlens[b, h, t]), cache.pages(b, h, t)
                scores = page_scores(pages, layout).reshape(-1).view(torch.int16)[:n].tolist()
                rows = zip(
                    targets[b, h, t].tolist(),
                    page_positions(pages, layout).flatten()[:n].tolist(),
                    scores,
                    strict=False,
                )
                expected += [(b, h, to, p, s) for to, p, s in rows if to >= 0]
    compact(ops, cache, targets)
    assert records(cache) == sorted(expected)
    assert compact(ops, cache, random_targets(cache, 1.0)) is None and not cache.cache_seqlens.any()
