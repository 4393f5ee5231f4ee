"""Means that turn with the position, and weights: every op that takes k_turns, turn_steps and k_weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_args import MAKE, check_refusal
from op_inputs import (
    DTYPES,
    HEAD_DIMS,
    assert_same_records,
    assert_within_eager,
    give_pages,
    paged,
    rotated,
    shift_of,
    strided,
    tokens,
    turning,
)
from test_op_attention import check_decode, window
from test_op_compile import CHECKS
from test_op_pages import assert_same_cache, compact, in_pages, random_targets, sources

from smartkv_ext import ops, reference
from smartkv_ext.reference.layout import TIERS, page_layout
from smartkv_ext.reference.turns import key_shift, waves

COUNTS = (1, 2, 3, 4, 5, 8)
TURNING_OPS = ("quantize_kv", "dequantize_kv", "append_kv", "compact_kv", "decode_attention")
INT32_MAX = 2**31 - 1


def far_apart(n: int) -> torch.Tensor:
    """(2, 2, n) positions over the whole range."""
    positions = torch.randint(INT32_MAX, (2, 2, n))
    positions[..., :1] = INT32_MAX
    return positions.int()


def test_waves_are_nearly_sine_and_cosine() -> None:
    positions, steps = far_apart(4000), torch.randint(2**32, (2, 2, 8)) - 2**31
    angle = positions[..., None].double() * steps[..., None, :] / 2**32 % 1 * (2 * math.pi)
    got = waves(positions, steps.int())
    assert float((got[..., 0] - angle.cos()).abs().max()) < 5e-5
    assert float((got[..., 1] - angle.sin()).abs().max()) < 1e-5


def test_the_mean_of_rope() -> None:
    """U and V of a pair of channels whose mean is (a, b) before RoPE: its mean after it, at every position."""
    frequency, a, b = 0.37, 3.0, -2.0
    turns = {
        "k_turns": torch.tensor([[a, b], [-b, a]]).half().view(1, 1, 1, 2, 2),
        "turn_steps": torch.tensor(round(frequency / (2 * math.pi) * 2**32)).int().view(1, 1, 1),
    }
    positions = torch.arange(5000).int()
    angle = positions.double() * frequency
    want = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    got = key_shift(torch.zeros(1, 1, 2), positions[None, None], **turns)[0, 0]
    assert float((got - want).abs().max()) < 3e-4


@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantize_and_dequantize(head_dim: int, bits: int) -> None:
    dtype, turns = DTYPES[head_dim % 3], turning(2, 2, COUNTS[(head_dim + bits) % len(COUNTS)], head_dim)
    args = tokens(2, 2, 70, head_dim, dtype) | {"positions": far_apart(70)}
    shift = shift_of(args["k_mean"], args["positions"], turns)
    args["k"] = (args["k"] + shift - args["k_mean"][:, :, None]).to(dtype)
    ours, expected = (x.quantize_kv(**args, **turns, bits=bits, levels="gaussian") for x in (ops, reference))
    own = (args["k"].float() - shift) * turns["k_weights"][:, :, None]
    y = rotated(own, args["v"], torch.zeros_like(args["k_mean"]))
    layout = page_layout(bits, head_dim, dtype.itemsize)
    assert_same_records(ours.flatten(0, 2), expected.flatten(0, 2), layout, "gaussian", tuple(map(in_pages, y)))
    back = [
        module.dequantize_kv(expected, args["k_mean"], head_dim, bits, "gaussian", out, **turns)
        for module, out in ((ops, dtype), (reference, dtype), (reference, dtype if bits == 16 else torch.float32))
    ]
    for got, eager, exact in zip(*back, strict=True):
        assert_within_eager(got, exact, eager, atol=2e-5)
    if bits == 8:  # what was subtracted is added again
        error = (back[2][0][:, :, :70] - args["k"]).norm() / (args["k"].float() - shift).norm()
        assert float(error) < 0.02


@pytest.mark.parametrize("turns", COUNTS)
def test_append(turns: int) -> None:
    cache = paged((302, 4, 16), 64, torch.bfloat16, sizes=(0, 1, 63, 64), turns=turns)
    give_pages(cache)
    new = tokens(2, 2, 40, 64, torch.bfloat16) | {"k_mean": cache.k_mean, "positions": far_apart(40)}
    tiers = torch.randint(-1, 3, (2, 40, 2)).to(torch.int8).transpose(1, 2)
    y = sources(cache)
    own = new["k"].float() - shift_of(cache.k_mean, new["positions"], cache.turns)
    yk, yv = rotated(own * cache.turns["k_weights"][:, :, None], new["v"], cache.k_mean * 0)
    for i, head in enumerate(y):
        b, h = divmod(i, 2)
        head |= {int(p): (yk[b, h, n], yv[b, h, n]) for n, p in enumerate(new["positions"][b, h])}
    ours, expected = cache.clone(), cache.clone()
    for module, into in ((ops, ours), (reference, expected)):
        module.append_kv(
            into.pools, into.block_table, into.cache_seqlens, **new, tiers=tiers, tier_bits=into.tier_bits,
            levels=into.levels, **into.turns,
        )  # fmt: skip
    assert_same_cache(ours, expected, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turns", (1, 8))
def test_demotion_from_raw_pages(turns: int, dtype: torch.dtype) -> None:
    cache = paged((2, 4, 16), 96, dtype, sizes=(0, 1, 64, 65), spare_pages=3, turns=turns)
    give_pages(cache)
    targets = random_targets(cache)
    ours, expected = cache.clone(), cache.clone()
    compact(ops, ours, targets)
    compact(reference, expected, targets)
    assert_same_cache(ours, expected, sources(cache))


@pytest.mark.parametrize("turns", COUNTS)
@pytest.mark.parametrize("tier_bits", (TIERS, (2, 16), (8,)), ids=str)
def test_decode(tier_bits: tuple[int, ...], turns: int) -> None:
    dtype, head_dim = DTYPES[turns % 3], HEAD_DIMS[(turns + len(tier_bits)) % len(HEAD_DIMS)]
    check_decode(paged(tier_bits, head_dim, dtype, turns=turns), 3, 1 + 4 * (turns % 2), window_len=13)


@pytest.mark.parametrize("q_len", (1, 2, 65))
@pytest.mark.parametrize("groups", (1, 4, 7, 32))
def test_decode_query_groups(groups: int, q_len: int) -> None:
    check_decode(paged((2, 4, 16), 64, heads=1, turns=6), groups, q_len, window_len=65)


@pytest.mark.parametrize("sliding_window", (1, 64, 10**6))
def test_decode_sliding_window(sliding_window: int) -> None:
    check_decode(paged((3, 8, 16), 80, torch.bfloat16, turns=4), 2, 6, window_len=40, sliding_window=sliding_window)


def test_decode_many_pages() -> None:
    cache = paged((2, 4), 128, batch=1, heads=1, sizes=(3000, 3001), turns=7)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check_decode(cache, 4, 1, 20)


@pytest.mark.parametrize("precision", ("fp32", "int16", "int8", "auto"))
def test_integer_products(precision: str) -> None:
    """The turns are added in float32, whatever the products are."""
    cache = paged((4, 8), 64, sizes=(130,), turns=5)
    cache.turns["k_turns"] *= 2
    q = strided(2, 8, 2, 64)
    k, v, positions, total = window(cache, 9, holes=False)
    args = (
        q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, k, v, positions, total - 2,
        cache.tier_bits, cache.levels, 0.02,
    )  # fmt: skip
    got = ops.decode_attention(*args, return_mass=True, precision=precision, **cache.turns)
    want = reference.decode_attention(*args, return_mass=True, **cache.turns)
    bound = {"fp32": 1e-5, "int16": 1e-3}.get(precision, 4e-2)
    for ours, exact in zip(got, want, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < bound


def test_queries_that_are_not_finite() -> None:
    cache = paged((4,), 64, sizes=(65,), turns=4)
    q = torch.randn(2, 4, 3, 64)
    q[0, 0, 1, 5], q[1, 2, 0, 0] = torch.nan, torch.inf
    args = (cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, None, None, None, 200, cache.tier_bits)
    out, lse, _, _ = ops.decode_attention(q, *args, **cache.turns)
    bad = torch.zeros(2, 4, 3, dtype=torch.bool)
    bad[0, 0, 1] = bad[1, 2, 0] = True
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(lse.isnan(), bad)


def test_no_turns_are_as_none() -> None:
    """Bit for bit: no turns, and turns of nothing."""
    cache = paged((2, 4, 16), 64, sizes=(63, 65))
    q = torch.randn(2, 4, 2, 64)
    args = (q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, None, None, None, 100, (2, 4, 16))
    new = tokens(2, 2, 65, 64)
    nothing = turning(2, 2, 3, 64)
    nothing["k_turns"].zero_()
    for turns in (turning(2, 2, 0, 64), nothing):
        turns["k_weights"].fill_(1)
        for precision in ("fp32", "int8"):
            want = ops.decode_attention(*args, return_mass=True, precision=precision)
            got = ops.decode_attention(*args, return_mass=True, precision=precision, **turns)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        pages = ops.quantize_kv(**new, bits=4)
        assert torch.equal(ops.quantize_kv(**new, bits=4, **turns), pages)
        for a, b in zip(
            ops.dequantize_kv(pages, new["k_mean"], 64, 4, "gaussian", torch.float32, **turns),
            ops.dequantize_kv(pages, new["k_mean"], 64, 4, "gaussian", torch.float32),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", TURNING_OPS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.smartkv, op).default, (), MAKE[op]() | turning(2, 2, 3, 64), test_utils=CHECKS
    )


GOOD = turning(2, 2, 3, 64)
REFUSALS: list[tuple[str, Any, str]] = [
    ("k_turns", None, "k_turns and turn_steps must be given together"),
    ("k_weights", torch.ones(2, 2, 64).half(), "k_weights must be float32; got float16"),
    (
        "k_weights",
        torch.ones(2, 2, 65),
        "k_weights must have shape (batch, num_kv_heads, head_dim) = (2, 2, 64); got (2, 2, 65)",
    ),
    ("turn_steps", None, "k_turns and turn_steps must be given together"),
    ("k_turns", GOOD["k_turns"].float(), "k_turns must be float16; got float32"),
    ("turn_steps", GOOD["turn_steps"].long(), "turn_steps must be int32; got int64"),
    ("k_turns", torch.zeros(2, 2, 9, 2, 64).half(), "k_turns must have at most 8 turns; got 9"),
    (
        "k_turns",
        torch.zeros(2, 2, 3, 64).half(),
        "k_turns must have 5 dimensions (batch, num_kv_heads, turns, 2, head_dim); got shape (2, 2, 3, 64)",
    ),
    (
        "k_turns",
        torch.zeros(2, 1, 3, 2, 64).half(),
        "k_turns must have shape (batch, num_kv_heads, turns, 2, head_dim) = (2, 2, 3, 2, 64); got (2, 1, 3, 2, 64)",
    ),
    (
        "turn_steps",
        torch.zeros(2, 2, 4).int(),
        "turn_steps must have shape (batch, num_kv_heads, turns) = (2, 2, 3); got (2, 2, 4)",
    ),
]


@pytest.mark.parametrize("op", TURNING_OPS)
@pytest.mark.parametrize(("argument", "bad", "message"), REFUSALS, ids=lambda x: x if isinstance(x, str) else "")
def test_refusals(op: str, argument: str, bad: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = MAKE[op]
    monkeypatch.setitem(MAKE, op, lambda: make() | GOOD)
    check_refusal(op, argument, bad, RuntimeError, message)
