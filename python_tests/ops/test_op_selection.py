"""select_kv equals the reference exactly; gate_score within float32 rounding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, HEAD_DIMS, SIZES, assert_within_eager, strided

from smartkv_ext import ops, reference
from smartkv_ext.reference.layout import PAGE_SIZE, TIERS, kv_bits, page_layout
from smartkv_ext.reference.levels import RELATIVE_DISTORTION


def costs(tier_bits: tuple[int, ...], head_dim: int = 128) -> tuple[list[int], list[float]]:
    distortion = [sum(RELATIVE_DISTORTION[b] for b in kv_bits(tier)) / 2 for tier in tier_bits]
    return [page_layout(tier, head_dim).page_bytes for tier in tier_bits], distortion


def check_select(scores, current, budgets, page_bytes, distortion, **options) -> torch.Tensor:
    ours = ops.select_kv(scores, current, budgets, page_bytes, distortion, **options)
    assert torch.equal(ours, reference.select_kv(scores, current, budgets, page_bytes, distortion, **options))
    return ours


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("heads", (1, 2, 5))
@pytest.mark.parametrize("tier_bits", (TIERS, (2, 4, 16), (3, 8), (4,)), ids=str)
def test_select(tier_bits: tuple[int, ...], heads: int, n: int) -> None:
    page_bytes, distortion = costs(tier_bits)
    scores = torch.randn(n, 3, heads).permute(1, 2, 0)
    scores[torch.rand(scores.shape) < 0.1] = -torch.inf
    scores[torch.rand(scores.shape) < 0.3] = 0.5  # ties
    current = torch.randint(-1, len(tier_bits) + 1, (3, heads, n)).to(torch.int8)
    for share in (0, 0.1, 0.5, 2.0):
        budgets = (torch.tensor([0.5, 1.0, 1.5]) * share * heads * n * page_bytes[-1] / PAGE_SIZE).long()
        tiers = check_select(scores, current, budgets, page_bytes, distortion)
        assert bool((tiers <= current).all()), "a token rose"
        assert bool((tiers[scores == -torch.inf] == -1).all())
        for g in range(3):
            bought = sum(
                -(-int((tiers[g, h] == t).sum()) // PAGE_SIZE) * page_bytes[t]
                for h in range(heads)
                for t in range(len(tier_bits))
            )
            assert bought <= budgets[g]


@given(seed=st.integers(0, 2**31), evict=st.sampled_from((1.0, 0.5, 1e6)), offset=st.sampled_from((64.0, 1.0, 1e-3)))
def test_select_equals_reference(seed: int, evict: float, offset: float) -> None:
    torch.manual_seed(seed)
    tier_bits = (TIERS, (2, 16), (8,))[seed % 3]
    page_bytes, distortion = costs(tier_bits, 64)
    shape = (2, 1 + seed % 3, seed % 200)
    scores = torch.randn(shape) * 10 ** ((seed % 7) - 3)
    scores.view(-1)[::11] = torch.tensor([torch.nan, torch.inf, -0.0, 0.0])[seed % 4]
    current = torch.randint(-1, len(tier_bits) + 1, shape).to(torch.int8)
    budgets = torch.randint(0, 1 + shape[1] * shape[2] * page_bytes[-1] // 40, (2,))
    check_select(scores, current, budgets, page_bytes, distortion, evict_distortion=evict, zipf_offset=offset)


def test_select_is_independent_of_threads() -> None:
    page_bytes, distortion = costs((2, 4, 16))
    scores, current = torch.randn(7, 2, 500), torch.full((7, 2, 500), 3, dtype=torch.int8)
    budgets = torch.arange(7) * 20000
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.select_kv(scores, current, budgets, page_bytes, distortion))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def mlp(layers: int, heads: int, sizes: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pairs = list(pairwise(sizes))
    weights = [torch.randn(layers, heads, o, i) / i**0.5 for i, o in pairs]
    return weights, [torch.randn(layers, heads, o) for _, o in pairs]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gate_score(head_dim: int, dtype: torch.dtype, n: int) -> None:
    for hidden in ((32,), (33,), (1,), (64, 17), (300, 5)):
        weights, biases = mlp(2, 3, (head_dim, *hidden, 1))
        keys = [strided(2, 3, n, head_dim, dtype=dtype) for _ in range(2)]
        ours = ops.gate_score(keys, weights, biases)
        eager = reference.gate_score(keys, weights, biases)
        exact = []
        for layer, key in enumerate(keys):
            x = key.double()
            for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
                x = torch.einsum("bhnd,hod->bhno", x, w[layer].double()) + b[layer].double()[:, None]
                x = x.relu() if i + 1 < len(weights) else x
            exact.append(x[..., 0])
        assert ours.shape == (2, 2, 3, n) and ours.dtype == torch.float32
        assert_within_eager(ours, torch.stack(exact), eager, 4e-6)
