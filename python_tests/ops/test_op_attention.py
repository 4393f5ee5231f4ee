"""decode_attention, attention_mass and merge_states against float64, beside eager torch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, GARBAGE_PAGE, HEAD_DIMS, Paged, assert_within_eager, paged, strided

from smartkv_ext import ops, reference
from smartkv_ext.reference.layout import PAGE_SIZE, TIERS

TIER_SETS = (TIERS, (2, 4, 16), (302, 8), (403,), (4,), (16,))
# Error of float32 arithmetic in another order, for results of order 1.
ATOL = 4e-6


def softmax_attention(q, k, v, allowed, softmax_scale: float):
    """q (g, m, d), k, v (n, d), allowed (m, n) -> out, lse, probabilities, in the dtype of q."""
    scores = (q @ k.T * softmax_scale).masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    probs = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    return probs @ torch.where(allowed.any(0)[:, None], v, 0), lse, probs


def expected_attention(
    q, cache: Paged, k_window, v_window, window_positions, q_start, softmax_scale, sliding_window, dtype
):
    """Dense attention over the dequantised cache, computed in dtype: (out, lse, mass, window_mass)."""
    batch, num_heads, q_len, _ = q.shape
    _, num_kv_heads, num_tiers, max_pages = cache.block_table.shape
    groups = num_heads // num_kv_heads
    out, lse = torch.zeros(q.shape, dtype=dtype), torch.zeros(q.shape[:-1], dtype=dtype)
    mass = torch.zeros(batch, num_kv_heads, num_tiers, max_pages * PAGE_SIZE, dtype=dtype)
    window_mass = torch.zeros(k_window.shape[:-1], dtype=dtype)
    at = torch.arange(q_start, q_start + q_len)[:, None]
    for b in range(batch):
        for h in range(num_kv_heads):
            k, v, position = cache.dense(b, h)
            k, v = (torch.cat(x).to(dtype) for x in ((k_window[b, h], k), (v_window[b, h], v)))
            position = torch.cat([window_positions[b], position])
            allowed = (position >= 0) & (position <= at)
            if sliding_window:
                allowed &= position > at - sliding_window
            heads = slice(h * groups, (h + 1) * groups)
            out[b, heads], lse[b, heads], probs = softmax_attention(q[b, heads].to(dtype), k, v, allowed, softmax_scale)
            parts = probs.sum((0, 1)).split([k_window.shape[2], *cache.cache_seqlens[b, h].tolist()])
            window_mass[b, h] = parts[0]
            for t, part in enumerate(parts[1:]):
                mass[b, h, t, : len(part)] = part
    return out, lse, mass, window_mass


def window(cache: Paged, window_len: int, holes: bool = True):
    """Keys and values behind the cache; every fifth slot holds no token and NaN."""
    batch, heads, head_dim = cache.k_mean.shape
    k, v = (strided(batch, heads, window_len, head_dim, dtype=cache.dtype) for _ in range(2))
    k += cache.k_mean[:, :, None].to(cache.dtype)
    first = int(cache.cache_seqlens.sum(-1).max())
    positions = torch.arange(first, first + window_len, dtype=torch.int32).repeat(batch, 1)
    if holes:
        positions[:, ::5] = -1
        k[:, :, ::5] = torch.nan
        v[:, :, ::5] = torch.nan
    return k, v, positions, first + window_len


def check_decode(cache: Paged, groups: int, q_len: int, window_len: int, sliding_window: int = 0) -> None:
    """Compare all four results, with and without mass."""
    batch, heads, head_dim = cache.k_mean.shape
    k_window, v_window, positions, total = window(cache, window_len)
    q = strided(batch, heads * groups, q_len, head_dim, dtype=cache.dtype)
    q_start, scale = max(total - q_len, 0), head_dim**-0.5
    threads = torch.get_num_threads()
    torch.set_num_threads(1 + (threads + window_len) % 3)
    got = ops.decode_attention(
        q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, k_window, v_window, positions,
        q_start, cache.tier_bits, cache.levels, scale, sliding_window, True, "fp32", **cache.turns,
    )  # fmt: skip
    torch.set_num_threads(threads)
    args = (q, cache, k_window, v_window, positions, q_start, scale, sliding_window)
    exact, eager = expected_attention(*args, torch.float64), expected_attention(*args, cache.dtype)
    for name, ours, true, plain in zip(("out", "lse", "mass", "window_mass"), got, exact, eager, strict=True):
        assert ours.shape == true.shape and ours.dtype == (cache.dtype if name == "out" else torch.float32)
        atol = ATOL * (
            max(1.0, float(true[torch.isfinite(true)].abs().max())) if bool(torch.isfinite(true).any()) else 1
        )
        assert_within_eager(ours, true, plain, atol, name)
    without = ops.decode_attention(
        q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, k_window, v_window, positions,
        q_start, cache.tier_bits, cache.levels, sliding_window=sliding_window, precision="fp32", **cache.turns,
    )  # fmt: skip
    assert torch.allclose(without[0].float(), got[0].float(), atol=1e-5, rtol=1e-2) and without[2].shape == (0,)
    assert without[3].shape == (0,)


@pytest.mark.parametrize("q_len", (1, 5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier_bits", TIER_SETS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode(head_dim: int, tier_bits: tuple[int, ...], dtype: torch.dtype, q_len: int) -> None:
    levels = ("gaussian", "uniform")[(head_dim // 16 + q_len) % 2]
    check_decode(paged(tier_bits, head_dim, dtype, levels), groups=3, q_len=q_len, window_len=13)


@pytest.mark.parametrize("q_len", (1, 2, 63, 65))
@pytest.mark.parametrize("groups", (1, 2, 4, 7, 8, 32))
def test_decode_query_groups(groups: int, q_len: int) -> None:
    check_decode(paged((2, 4, 16), 64, heads=1), groups, q_len, window_len=65)


@pytest.mark.parametrize("sliding_window", (1, 3, 64, 100, 10**6))
@pytest.mark.parametrize("q_len", (1, 6))
def test_decode_sliding_window(sliding_window: int, q_len: int) -> None:
    check_decode(paged((3, 8, 16), 80, torch.bfloat16), 2, q_len, window_len=40, sliding_window=sliding_window)


@pytest.mark.parametrize("window_len", (0, 1, 63, 64, 65, 130))
def test_decode_window_sizes(window_len: int) -> None:
    check_decode(paged((4, 16), 96, sizes=(0, 65)), 2, 1, window_len)


def test_decode_many_pages() -> None:
    """Enough pages that the work is split over threads inside a head."""
    cache = paged((2, 4), 128, batch=1, heads=1, sizes=(3000, 3001))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check_decode(cache, 4, 1, 20)


def empty_cache(head_dim: int, max_pages: int, dtype: torch.dtype) -> Paged:
    cache = paged((2, 16), head_dim, dtype, sizes=(0,))
    cache.block_table = torch.full((2, 2, 2, max_pages), GARBAGE_PAGE, dtype=torch.int32)
    return cache


@pytest.mark.parametrize("max_pages", (0, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_of_nothing(dtype: torch.dtype, max_pages: int) -> None:
    """A query that sees no key returns 0 and -inf."""
    cache = empty_cache(64, max_pages, dtype)
    for window_len in (0, 3):
        nothing = torch.full((2, 2, window_len, 64), torch.nan, dtype=dtype)
        positions = torch.full((2, window_len), -1, dtype=torch.int32)
        out, lse, mass, window_mass = ops.decode_attention(
            torch.randn(2, 4, 3, 64).to(dtype), cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean,
            nothing, nothing, positions, 7, cache.tier_bits, return_mass=True,
        )  # fmt: skip
        assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())
        assert mass.shape == (2, 2, 2, max_pages * 64) and not mass.any() and not window_mass.any()


def test_decode_of_some_lonely_queries() -> None:
    """Queries before the first key see nothing, those after it see something."""
    cache = empty_cache(64, 1, torch.float32)
    k, v = strided(2, 2, 4, 64), strided(2, 2, 4, 64)
    positions = torch.arange(2, 6, dtype=torch.int32).repeat(2, 1)
    q = torch.randn(2, 2, 5, 64)
    out, lse, _, _ = ops.decode_attention(
        q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, k, v, positions, 0, cache.tier_bits
    )
    assert not out[:, :, :2].any() and bool((lse[:, :, :2] == -torch.inf).all())
    assert torch.allclose(out[:, :, 2], v[:, :, 0], atol=1e-6) and bool(torch.isfinite(lse[:, :, 2:]).all())


def test_decode_survives_large_scores() -> None:
    cache = paged((4, 16), 64, sizes=(65,))
    cache.k_mean *= 100
    check_scores = torch.randn(2, 2, 1, 64) * 50
    k, v, positions, total = window(cache, 8, holes=False)
    args = (
        check_scores, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, k, v, positions, total - 1,
        cache.tier_bits, cache.levels, 1.0,
    )  # fmt: skip
    got, want = ops.decode_attention(*args, precision="fp32"), reference.decode_attention(*args)
    assert torch.allclose(got[1], want[1], rtol=1e-5) and bool(torch.isfinite(got[0]).all())


@pytest.mark.parametrize("kv_len", (0, 1, 63, 64, 65, 130))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_mass(head_dim: int, dtype: torch.dtype, kv_len: int) -> None:
    for q_len, sliding_window in ((1, 0), (65, 0), (9, 20)):
        q, k = strided(2, 4, q_len, head_dim, dtype=dtype), strided(2, 2, kv_len, head_dim, dtype=dtype)
        positions = torch.arange(kv_len, dtype=torch.int32).repeat(2, 1)
        positions[1, ::7] = -1
        k[1, :, ::7] = torch.nan
        q_start, scale = max(kv_len - q_len, 0), head_dim**-0.5
        at = torch.arange(q_start, q_start + q_len)[:, None]
        allowed = (positions[:, None] >= 0) & (positions[:, None] <= at)
        if sliding_window:
            allowed &= positions[:, None] > at - sliding_window

        def plain(x: torch.dtype, q=q, k=k, allowed=allowed, scale=scale) -> tuple[torch.Tensor, torch.Tensor]:
            scores = q.to(x) @ k.to(x).repeat_interleave(2, 1).transpose(-1, -2) * scale
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
            lse = scores.logsumexp(-1)
            probs = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
            return probs.sum(2).unflatten(1, (2, 2)).sum(2), lse

        (exact, lse), (eager, _) = plain(torch.float64), plain(dtype)
        for given_lse in (None, lse.float()):
            ours = ops.attention_mass(q, k, positions, q_start, scale, sliding_window, given_lse)
            assert_within_eager(ours, exact, eager, ATOL * max(1, q_len), "mass")


def test_mass_of_decode_agrees_with_attention_mass() -> None:
    """One definition of mass: a window is all that decode_attention sees."""
    cache = empty_cache(64, 0, torch.float32)
    k, v, positions, total = window(cache, 50)
    q = torch.randn(2, 4, 3, 64)
    got = ops.decode_attention(
        q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, k, v, positions, total - 3,
        cache.tier_bits, return_mass=True, precision="fp32",
    )  # fmt: skip
    assert torch.allclose(got[3], ops.attention_mass(q, k, positions, total - 3, 64**-0.5), atol=1e-5)


@pytest.mark.parametrize("rows", (0, 1, 63, 64, 65, 130))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_merge_states(head_dim: int, dtype: torch.dtype, rows: int) -> None:
    for num_states in (1, 2, 7):
        o = strided(num_states, 2, rows, head_dim, dtype=dtype)
        lse = torch.randn(num_states, 2, rows) * 5
        empty = torch.rand(lse.shape) < 0.2
        lse[empty], o[empty] = -torch.inf, torch.nan
        out, out_lse = ops.merge_states(o, lse)
        exact_lse = lse.double().logsumexp(0)
        weight = torch.exp(lse.double() - exact_lse.clamp(min=torch.finfo(torch.float64).min))[..., None]
        exact = torch.where(weight > 0, o.double() * weight, 0).sum(0)
        eager = reference.merge_states(o, lse)[0].to(dtype)
        assert out.dtype == dtype and out.shape == o.shape[1:]
        assert_within_eager(out, exact, eager, ATOL, "o")
        assert_within_eager(out_lse, exact_lse, exact_lse, ATOL * 10, "lse")


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda x: sum(x) > 0),
    split=st.integers(0, 6),
    scale=st.floats(0.01, 20),
)
def test_merge_equals_softmax_over_the_concatenation(sizes: list[int], split: int, scale: float) -> None:
    """Merging states of disjoint keys, in one go or in two steps, gives attention over all keys."""
    torch.manual_seed(sum(sizes))
    q, k, v = torch.randn(3, 64), torch.randn(sum(sizes), 64), torch.randn(sum(sizes), 64)
    states = []
    for part_k, part_v in zip(k.split(sizes), v.split(sizes), strict=True):
        scores = q @ part_k.T * scale / 8
        lse = scores.logsumexp(-1)
        states.append((torch.softmax(scores, -1) @ part_v, lse))
    o, lse = torch.stack([s[0] for s in states]), torch.stack([s[1] for s in states])
    whole = q @ k.T * scale / 8
    merged, merged_lse = ops.merge_states(o, lse)
    assert torch.allclose(merged, torch.softmax(whole, -1) @ v, atol=3e-5)
    assert torch.allclose(merged_lse, whole.logsumexp(-1), atol=3e-5, rtol=1e-5)
    cut = min(max(split, 1), len(sizes))
    parts = [ops.merge_states(o[:cut], lse[:cut])]
    if cut < len(sizes):
        parts.append(ops.merge_states(o[cut:], lse[cut:]))
    again, again_lse = ops.merge_states(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    assert torch.allclose(again, merged, atol=3e-5) and torch.allclose(again_lse, merged_lse, atol=3e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_merge_states_on_cuda(head_dim: int, dtype: torch.dtype) -> None:
    o, lse = torch.randn(40, 65, head_dim).to(dtype), torch.randn(40, 65) * 5
    lse[:20, ::3], lse[:, 7] = -torch.inf, -torch.inf
    o[:20, ::3] = torch.nan
    out, out_lse = ops.merge_states(o.cuda(), lse.cuda())
    want, want_lse = ops.merge_states(o, lse)
    assert torch.allclose(out.cpu().float(), want.float(), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    assert torch.allclose(out_lse.cpu(), want_lse, atol=1e-5)
