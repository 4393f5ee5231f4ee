"""Every op on CUDA against the reference. On the CPU, which the other tests of ops cover, one case of each shows that
these tests themselves are right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_inputs import (
    DTYPES,
    HEAD_DIMS,
    Paged,
    assert_same_records,
    assert_within_eager,
    give_pages,
    paged,
    rotated,
    rotated_pages,
    tokens,
)
from test_op_attention import expected_attention, window

from smartkv_ext import ops, reference
from smartkv_ext.reference.layout import TIERS, page_layout


def cases(*values: Any, cpu: Any) -> list[Any]:
    """(value, device): every value on CUDA, the one named on the CPU."""
    on_gpu = [pytest.param(value, "cuda", marks=pytest.mark.gpu) for value in values]
    return [pytest.param(cpu, "cpu"), *on_gpu]


def to(args: Any, device: str) -> Any:
    """Tensors of an argument, or of all arguments, on the device; strides are kept."""
    if isinstance(args, torch.Tensor):
        return args.to(device)
    if isinstance(args, dict):
        return {name: to(value, device) for name, value in args.items()}
    return [to(x, device) for x in args] if isinstance(args, list) else args


def cache_args(cache: Paged, device: str) -> dict[str, Any]:
    return to(
        {
            "pools": [pool.clone() for pool in cache.pools],
            "block_table": cache.block_table.clone(),
            "cache_seqlens": cache.cache_seqlens.clone(),
            "k_mean": cache.k_mean,
            "tier_bits": list(cache.tier_bits),
            "levels": cache.levels,
        },
        device,
    )


@pytest.mark.parametrize("case, device", cases(*itertools.product(HEAD_DIMS, TIERS), cpu=(64, 3)), ids=str)
def test_pages(case: tuple[int, int], device: str) -> None:
    head_dim, bits = case
    dtype = DTYPES[(head_dim + bits) % 3]
    args = tokens(2, 2, 64, head_dim, dtype)
    layout = page_layout(bits, head_dim, dtype.itemsize)
    expected = reference.quantize_kv(**args, bits=bits, levels="gaussian")
    pages = ops.quantize_kv(**to(args, device), bits=bits, levels="gaussian")
    y = tuple(x.flatten(0, 1) for x in rotated(args["k"], args["v"], args["k_mean"]))
    assert_same_records(pages.cpu().flatten(0, 2), expected.flatten(0, 2), layout, "gaussian", y)
    back = ops.dequantize_kv(to(expected, device), to(args["k_mean"], device), head_dim, bits, "gaussian", dtype)
    wanted = reference.dequantize_kv(expected, args["k_mean"], head_dim, bits, "gaussian", dtype)
    for ours, want in zip(back, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), want, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("head_dim, device", cases(*HEAD_DIMS, cpu=80), ids=str)
def test_append_and_compact(head_dim: int, device: str) -> None:
    cache = paged(TIERS, head_dim, DTYPES[head_dim % 3], sizes=(0, 1, 63, 65))
    give_pages(cache)
    ours, theirs = cache_args(cache, device), cache_args(cache, "cpu")
    new = tokens(2, 2, 5, head_dim, cache.dtype) | {"k_mean": cache.k_mean}
    new |= {"tiers": torch.randint(-1, len(TIERS), (2, 2, 5), dtype=torch.int8)}
    ops.append_kv(**ours, **{k: v for k, v in to(new, device).items() if k != "k_mean"})
    reference.append_kv(**theirs, **{k: v for k, v in new.items() if k != "k_mean"})
    shape = (2, 2, 1, cache.block_table.shape[3] * 64)
    targets = torch.cat([torch.randint(-1, t + 1, shape, dtype=torch.int8) for t in range(len(TIERS))], 2)
    for args, op in ((ours, ops.compact_kv), (theirs, reference.compact_kv)):
        op(**args, targets=to(targets, args["k_mean"].device.type), dtype=cache.dtype)
    assert torch.equal(ours["cache_seqlens"].cpu(), theirs["cache_seqlens"])
    for t, layout in enumerate(cache.layouts):
        for b in range(2):
            for h in range(2):
                n = int(theirs["cache_seqlens"][b, h, t])
                ids = cache.block_table[b, h, t, : -(-n // 64)].long()
                got, want = ours["pools"][t].cpu()[ids], theirs["pools"][t][ids]
                if n == 0 or torch.equal(got, want):
                    continue
                assert layout.tier != 16, "raw records differ"
                # Codes at a midpoint may differ: what they stand for may not.
                for a, w in zip(*(rotated_pages(x, layout, cache.levels) for x in (got, want)), strict=True):
                    error = (a - w).flatten(0, 1)[:n].norm() / w.flatten(0, 1)[:n].norm()
                    assert error < 0.02, f"tier {layout.tier}: error {error:.3g}"


@pytest.mark.parametrize(
    "case, device", cases(*itertools.product(HEAD_DIMS, DTYPES), cpu=(64, torch.bfloat16)), ids=str
)
def test_decode_attention(case: tuple[int, torch.dtype], device: str) -> None:
    head_dim, dtype = case
    cache = paged(TIERS, head_dim, dtype)
    k_window, v_window, positions, total = window(cache, 65)
    for q_len, groups, sliding_window in ((1, 4, 0), (5, 3, 40)):
        q = torch.randn(2, 2 * groups, q_len, head_dim).to(dtype)
        case = (k_window, v_window, positions, total - q_len, head_dim**-0.5, sliding_window)
        got = ops.decode_attention(
            to(q, device), **cache_args(cache, device), k_window=to(k_window, device), v_window=to(v_window, device),
            window_positions=to(positions, device), q_start=total - q_len, sliding_window=sliding_window,
            return_mass=True, precision="fp32",
        )  # fmt: skip
        exact = expected_attention(q, cache, *case, torch.float64)
        eager = expected_attention(q, cache, *case, dtype)
        for name, ours, want, rough in zip(("out", "lse", "mass", "window_mass"), got, exact, eager, strict=True):
            assert_within_eager(ours.cpu(), want, rough, 1e-4, name)


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
def test_scores(device: str) -> None:
    q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 130, 64)
    positions = torch.arange(130).int().repeat(2, 1)
    case = {"q": q, "k": k, "k_positions": positions, "q_start": 121, "softmax_scale": 0.125, "sliding_window": 50}
    got = ops.attention_mass(**to(case, device)).cpu()
    assert torch.allclose(got, reference.attention_mass(**case), atol=1e-4)

    scores, current = torch.randn(3, 4, 200), torch.randint(-1, 4, (3, 4, 200), dtype=torch.int8)
    budgets = torch.tensor([0, 100_000, 10**7])
    costs = ([4992, 7040, 9088], [0.1175, 0.03454, 0.009497])
    tiers = ops.select_kv(to(scores, device), to(current, device), to(budgets, device), *costs)
    assert torch.equal(tiers.cpu(), reference.select_kv(scores, current, budgets, *costs))

    o, lse = torch.randn(5, 7, 64), torch.randn(5, 7)
    lse[:, 2] = -torch.inf
    for ours, want in zip(ops.merge_states(*to([o, lse], device)), reference.merge_states(o, lse), strict=True):
        torch.testing.assert_close(ours.cpu(), want)

    args = [torch.randn(2, 6, 5, 80), torch.randn(3, 80, 80), torch.randn(3, 80), torch.randn(3, 80)]
    torch.testing.assert_close(ops.change_basis(*to(args, device)).cpu(), reference.change_basis(*args))

    for n, dtype, atol in ((3, torch.bfloat16, 1e-3), (100, torch.float32, 1e-3), (100, torch.bfloat16, 0.1)):
        keys = [torch.randn(1, 2, n, 128).to(dtype) for _ in range(2)]
        weights = [torch.randn(2, 2, o, i) * i**-0.5 for i, o in ((128, 256), (256, 256), (256, 1))]
        biases = [torch.randn(2, 2, o) for o in (256, 256, 1)]
        got = ops.gate_score(*to([keys, weights, biases], device)).cpu()
        assert torch.allclose(got, reference.gate_score(keys, weights, biases), atol=atol)


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
def test_nan_shows(device: str) -> None:
    """A key that is NaN has a score that is NaN, and so has everything that attends to it."""
    for n, dtype in ((1, torch.bfloat16), (5, torch.float32), (100, torch.bfloat16)):
        keys = torch.randn(1, 2, n, 128).to(dtype)
        keys[0, 1, n // 2, 5] = torch.nan
        weights = [torch.randn(1, 2, o, i) for i, o in ((128, 256), (256, 256), (256, 1))]
        biases = [torch.randn(1, 2, o) for o in (256, 256, 1)]
        spoiled = torch.zeros(1, 1, 2, n, dtype=torch.bool)
        spoiled[0, 0, 1, n // 2] = True
        assert torch.equal(ops.gate_score(*to([[keys], weights, biases], device)).cpu().isnan(), spoiled)
    cache = paged((4,), 64, torch.bfloat16)
    k_window, v_window, positions, total = window(cache, 65)
    slot = int(positions[0].argmax())
    k_window[0, 1, slot, 5] = torch.nan
    q = torch.randn(2, 4, 1, 64).to(torch.bfloat16)
    out, lse = ops.decode_attention(
        to(q, device), **cache_args(cache, device), k_window=to(k_window, device), v_window=to(v_window, device),
        window_positions=to(positions, device), q_start=total,
    )[:2]  # fmt: skip
    seen = torch.zeros(2, 4, 1, dtype=torch.bool)
    seen[0, 2:] = True
    assert torch.equal(lse.cpu().isnan(), seen) and torch.equal(out.cpu().isnan().all(-1), seen)


@pytest.mark.gpu
def test_decode_step_is_captured_without_synchronisation() -> None:
    """A CUDA graph of decode_attention follows lengths and positions that change on the device."""
    cache = paged((4, 16), 128, torch.bfloat16, sizes=(130,))
    give_pages(cache)
    k_window, v_window, positions, total = window(cache, 64)
    args = cache_args(cache, "cuda") | to(
        {"k_window": k_window, "v_window": v_window, "window_positions": positions}, "cuda"
    )
    q = torch.randn(2, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    start = torch.tensor([total], device="cuda")
    ops.decode_attention(q, **args, q_start=start)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.decode_attention(q, **args, q_start=start)[0]
        found = []
        for length, position in ((130, total), (65, 40), (0, total), (192, 129)):
            args["cache_seqlens"].fill_(length)
            start.fill_(position)
            graph.replay()
            again = ops.decode_attention(q, **args, q_start=start)[0]
            found.append((out.clone(), again))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for replayed, launched in found:  # only now: to compare is to wait
        assert torch.equal(torch.nan_to_num(replayed), torch.nan_to_num(launched))


@pytest.mark.gpu
def test_wrong_values_stay_inside_the_cache() -> None:
    """The host cannot check values on the device: wrong ones may give wrong results, but no fault."""
    cache = paged((4,), 64, torch.float16)
    args = cache_args(cache, "cuda")
    args["block_table"].fill_(2**31 - 1)
    args["cache_seqlens"].fill_(2**31 - 1)
    none = torch.empty(2, 2, 0, 64, dtype=torch.float16, device="cuda")
    nowhere = torch.empty(2, 0, dtype=torch.int32, device="cuda")
    q = torch.randn(2, 4, 1, 64, dtype=torch.float16, device="cuda")
    ops.decode_attention(q, **args, k_window=none, v_window=none, window_positions=nowhere, q_start=9)
    torch.cuda.synchronize()
