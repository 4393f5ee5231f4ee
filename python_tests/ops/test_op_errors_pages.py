"""What the page ops refuse: a sentence that names the argument, and no argument changed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from op_args import INT32_MAX, WRONG_BITS, append_args, at, check_refusal, misaligned, name_of, of, quantize_args
from op_inputs import tokens

from smartkv_ext import ops
from smartkv_ext.reference.layout import page_layout

PAGE_2 = page_layout(2, 64).page_bytes
V, R, T = ValueError, RuntimeError, TypeError

# (op, argument, its bad value or a function that makes it from the good arguments, error, message)
CASES = [
    ("quantize_kv", "bits", 5, V, WRONG_BITS),
    ("quantize_kv", "bits", 2**40, V, "bits must be one of 2, 302, 3, 403, 4, 8, 16; got 1099511627776"),
    ("quantize_kv", "levels", "cubic", V, "levels must be one of uniform, gaussian; got 'cubic'"),
    ("quantize_kv", "k", torch.zeros(2, 2, 65, 72), V, "head_dim must be one of 64, 80, 96, 128, 256; got 72"),
    (
        "quantize_kv",
        "k",
        torch.zeros(2, 2, 65, 64).double(),
        V,
        "k.dtype must be one of float32, bfloat16, float16; got float64",
    ),
    ("quantize_kv", "k", torch.zeros(2, 65, 64), V, "k must have 4 dimensions; got shape (2, 65, 64)"),
    ("quantize_kv", "k", 3, T, "k must be a torch.Tensor; got int"),
    (
        "quantize_kv",
        "k",
        of("k", lambda x: torch.zeros(2, 2, 65, 128)[..., ::2]),
        R,
        "k must be contiguous in its last dimension; got stride 2",
    ),
    ("quantize_kv", "v", of("v", lambda x: x.half()), R, "v must be float32; got float16"),
    (
        "quantize_kv",
        "v",
        of("v", lambda x: x[:, :, 1:]),
        R,
        "v must have shape of k = (2, 2, 65, 64); got (2, 2, 64, 64)",
    ),
    (
        "quantize_kv",
        "k_mean",
        torch.zeros(2, 2, 65),
        R,
        "k_mean must have shape (batch, num_kv_heads, head_dim) = (2, 2, 64); got (2, 2, 65)",
    ),
    ("quantize_kv", "k_mean", torch.zeros(2, 2, 64).half(), R, "k_mean must be float32; got float16"),
    ("quantize_kv", "positions", torch.zeros(2, 2, 65).long(), R, "positions must be int32; got int64"),
    (
        "quantize_kv",
        "positions",
        torch.zeros(2, 2, 64).int(),
        R,
        "positions must have shape (batch, num_kv_heads, n) = (2, 2, 65); got (2, 2, 64)",
    ),
    ("quantize_kv", "scores", torch.zeros(2, 2, 65).int(), R, "scores must be float32; got int32"),
    (
        "quantize_kv",
        "scores",
        torch.zeros(65),
        R,
        "scores must have shape (batch, num_kv_heads, n) = (2, 2, 65); got (65,)",
    ),
    ("dequantize_kv", "bits", 5, V, WRONG_BITS),
    ("dequantize_kv", "head_dim", 65, V, "head_dim must be one of 64, 80, 96, 128, 256; got 65"),
    ("dequantize_kv", "levels", "", V, "levels must be one of uniform, gaussian; got ''"),
    ("dequantize_kv", "dtype", torch.int8, V, "dtype must be one of float32, bfloat16, float16; got int8"),
    ("dequantize_kv", "dtype", "float32", T, "dtype must be a torch.dtype; got str"),
    (
        "dequantize_kv",
        "pages",
        torch.zeros(2, 2, 1, 7).byte(),
        R,
        "pages must have shape (batch, num_kv_heads, num_pages, page_bytes) = (2, 2, 1, 4736); got (2, 2, 1, 7)",
    ),
    (
        "dequantize_kv",
        "pages",
        torch.zeros(2, 4736).byte(),
        R,
        "pages must have 4 dimensions (batch, num_kv_heads, num_pages, page_bytes); got shape (2, 4736)",
    ),
    ("dequantize_kv", "pages", of("pages", lambda x: x.to(torch.int8)), R, "pages must be uint8; got int8"),
    ("dequantize_kv", "pages", of("pages", misaligned), R, "pages must start at an address that is a multiple of 64"),
    (
        "dequantize_kv",
        "k_mean",
        torch.zeros(1, 2, 64),
        R,
        "k_mean must have shape (batch, num_kv_heads, head_dim) = (2, 2, 64); got (1, 2, 64)",
    ),
    ("append_kv", "levels", "x", V, "levels must be one of uniform, gaussian; got 'x'"),
    ("append_kv", "tier_bits", [], R, "tier_bits must have 1 to 7 entries; got 0"),
    ("append_kv", "tier_bits", [2, 302, 3, 403, 4, 8, 16, 16], R, "tier_bits must have 1 to 7 entries; got 8"),
    ("append_kv", "tier_bits", [2, 5, 16], R, WRONG_BITS),
    (
        "append_kv",
        "tier_bits",
        [2, 2, 16],
        R,
        "tier_bits must ascend by the bits of keys and values (302: 3 and 2); got 2 after 2",
    ),
    (
        "append_kv",
        "tier_bits",
        [2, 4],
        R,
        "block_table must have shape (batch, num_kv_heads, num_tiers, max_pages) = (2, 2, 2, 3); got (2, 2, 3, 3)",
    ),
    (
        "append_kv",
        "pools",
        of("pools", lambda x: x[:2]),
        R,
        "pools must have one tensor per entry of tier_bits (3); got 2",
    ),
    (
        "append_kv",
        "pools",
        at("pools", 0, torch.zeros(9, PAGE_2 + 1).byte()),
        R,
        f"pools[0] must have pages of {PAGE_2} bytes (tier 2, head_dim 64); got {PAGE_2 + 1}",
    ),
    ("append_kv", "pools", at("pools", 0, torch.zeros(9, PAGE_2)), R, "pools[0] must be uint8; got float32"),
    (
        "append_kv",
        "pools",
        at("pools", 0, torch.zeros(9 * PAGE_2).byte()),
        R,
        "pools[0] must have 2 dimensions (num_pages, page_bytes)",
    ),
    (
        "append_kv",
        "pools",
        at("pools", 0, torch.zeros(1, PAGE_2).byte().expand(9, -1)),
        R,
        "pools[0] must be contiguous",
    ),
    (
        "append_kv",
        "pools",
        at("pools", 0, misaligned(torch.zeros(9, PAGE_2).byte())),
        R,
        "pools[0] must start at an address that is a multiple of 64",
    ),
    ("append_kv", "pools", of("pools", lambda x: [p[:1] for p in x]), R, "a page of the tier's pool; got"),
    ("append_kv", "block_table", torch.zeros(2, 2, 3).int(), R, "block_table must have 4 dimensions"),
    ("append_kv", "block_table", of("block_table", lambda x: x.long()), R, "block_table must be int32; got int64"),
    ("append_kv", "block_table", of("block_table", lambda x: x * 0 + INT32_MAX), R, "got 2147483647"),
    ("append_kv", "block_table", of("block_table", lambda x: x * 0 - 1), R, "got -1"),
    (
        "append_kv",
        "cache_seqlens",
        at("cache_seqlens", (0, 1, 2), -1),
        R,
        "cache_seqlens[0, 1, 2] must be in [0, 192], 64 per page of block_table; got -1",
    ),
    (
        "append_kv",
        "cache_seqlens",
        at("cache_seqlens", (1, 0, 1), 193),
        R,
        "cache_seqlens[1, 0, 1] must be in [0, 192], 64 per page of block_table; got 193",
    ),
    (
        "append_kv",
        "cache_seqlens",
        at("cache_seqlens", (1, 1, 0), 190),
        R,
        "block_table[1, 1, 0] must have room for 4 pages; max_pages is 3",
    ),
    (
        "append_kv",
        "cache_seqlens",
        of("cache_seqlens", lambda x: x.long()),
        R,
        "cache_seqlens must be int32; got int64",
    ),
    ("append_kv", "cache_seqlens", torch.zeros(3, 2, 2).int().permute(2, 1, 0), R, "cache_seqlens must be contiguous"),
    (
        "append_kv",
        "cache_seqlens",
        torch.zeros(2, 2, 2).int(),
        R,
        "cache_seqlens must have shape (batch, num_kv_heads, num_tiers) = (2, 2, 3); got (2, 2, 2)",
    ),
    ("append_kv", "k_mean", torch.zeros(2, 2, 32), R, "head_dim must be one of 64, 80, 96, 128, 256; got 32"),
    ("append_kv", "k", torch.zeros(2, 2, 5, 64).half(), R, "pools[2] must have pages of"),
    (
        "append_kv",
        "k",
        torch.zeros(2, 1, 5, 64),
        R,
        "k must have shape (batch, num_kv_heads, n, head_dim) = (2, 2, 5, 64); got (2, 1, 5, 64)",
    ),
    (
        "append_kv",
        "v",
        torch.zeros(2, 2, 4, 64),
        R,
        "v must have shape (batch, num_kv_heads, n, head_dim) = (2, 2, 5, 64); got (2, 2, 4, 64)",
    ),
    ("append_kv", "tiers", at("tiers", (1, 1, 4), 3), R, "tiers must be in [-1, 2]; got 3"),
    ("append_kv", "tiers", at("tiers", (1, 1, 4), -2), R, "tiers must be in [-1, 2]; got -2"),
    ("append_kv", "tiers", torch.zeros(2, 2, 5).int(), R, "tiers must be int8; got int32"),
    ("append_kv", "positions", torch.zeros(2, 2, 5).long(), R, "positions must be int32; got int64"),
    (
        "append_kv",
        "scores",
        torch.zeros(2, 2, 4),
        R,
        "scores must have shape (batch, num_kv_heads, n) = (2, 2, 5); got (2, 2, 4)",
    ),
    ("compact_kv", "levels", "x", V, "levels must be one of uniform, gaussian; got 'x'"),
    ("compact_kv", "dtype", torch.float64, V, "dtype must be one of float32, bfloat16, float16; got float64"),
    ("compact_kv", "dtype", torch.float16, R, "pools[2] must have pages of"),
    (
        "compact_kv",
        "targets",
        at("targets", (1, 1, 0, 0), 1),
        R,
        "targets must be in [-1, 0] for records of tier 0: a record can not rise; got 1",
    ),
    (
        "compact_kv",
        "targets",
        at("targets", (1, 1, 2, 0), -2),
        R,
        "targets must be in [-1, 2] for records of tier 2: a record can not rise; got -2",
    ),
    (
        "compact_kv",
        "targets",
        of("targets", lambda x: x[..., 1:]),
        R,
        "targets must have shape (batch, num_kv_heads, num_tiers, max_pages * 64) = (2, 2, 3, 192); got (2, 2, 3, 191)",
    ),
    ("compact_kv", "targets", of("targets", lambda x: x.int()), R, "targets must be int8; got int32"),
    ("compact_kv", "block_table", of("block_table", lambda x: x * 0 - 5), R, "a page of the tier's pool; got -5"),
]


@pytest.mark.parametrize(("op", "argument", "bad", "error", "message"), CASES, ids=name_of)
def test_refusal(op: str, argument: str, bad: Any, error: type[Exception], message: str) -> None:
    check_refusal(op, argument, bad, error, message)


def test_refusals_come_before_any_change() -> None:
    """The last token of the last head does not fit: the first heads must not have been written."""
    args = append_args()
    args["cache_seqlens"][1, 1, 0] = 191
    before = [p.clone() for p in args["pools"]], args["cache_seqlens"].clone()
    with pytest.raises(RuntimeError, match="block_table\\[1, 1, 0\\] must have room"):
        ops.append_kv(**args)
    assert all(torch.equal(a, b) for a, b in zip(args["pools"], before[0], strict=True))
    assert torch.equal(args["cache_seqlens"], before[1])


def test_the_binding_checks_without_the_wrapper() -> None:
    """Other languages and exported programs call the op, not the Python function."""
    call = torch.ops.smartkv.quantize_kv
    with pytest.raises(RuntimeError, match=re.escape(WRONG_BITS)):
        call(**{**quantize_args(), "bits": 5})
    with pytest.raises(RuntimeError, match="levels must be one of uniform, gaussian; got 'x'"):
        call(**{**quantize_args(), "levels": "x"})
    with pytest.raises(RuntimeError, match="head_dim must be one of 64, 80, 96, 128, 256; got 72"):
        call(**{**quantize_args(), "k": torch.zeros(2, 2, 65, 72), "v": torch.zeros(2, 2, 65, 72)})
    with pytest.raises(RuntimeError, match="batch must be in"):
        call(**{**tokens(0, 2, 5, 64), "bits": 4, "levels": "gaussian"})
