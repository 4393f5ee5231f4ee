"""Good arguments of every op, ways to spoil one of them, and the check that it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from op_inputs import Paged, give_pages, paged, tokens

from smartkv_ext import ops

INT32_MAX = 2**31 - 1
WRONG_BITS = "bits must be one of 2, 302, 3, 403, 4, 8, 16; got 5"


def quantize_args() -> dict[str, Any]:
    return {**tokens(2, 2, 65, 64), "bits": 4, "levels": "gaussian"}


def dequantize_args() -> dict[str, Any]:
    pages = ops.quantize_kv(**quantize_args())
    return {
        "pages": pages,
        "k_mean": torch.zeros(2, 2, 64),
        "head_dim": 64,
        "bits": 4,
        "levels": "gaussian",
        "dtype": torch.float32,
    }


@lru_cache(maxsize=1)
def small_cache() -> Paged:
    cache = paged((2, 4, 16), 64, sizes=(1, 63))
    give_pages(cache)
    return cache


def cache_args() -> dict[str, Any]:
    cache = small_cache().clone()
    return {
        "pools": cache.pools,
        "block_table": cache.block_table,
        "cache_seqlens": cache.cache_seqlens,
        "k_mean": cache.k_mean,
        "tier_bits": [2, 4, 16],
        "levels": "gaussian",
    }


def append_args() -> dict[str, Any]:
    return {**tokens(2, 2, 5, 64), **cache_args(), "tiers": torch.zeros(2, 2, 5, dtype=torch.int8)}


def compact_args() -> dict[str, Any]:
    args = cache_args()
    return {
        **args,
        "targets": torch.full((2, 2, 3, args["block_table"].shape[3] * 64), -1).to(torch.int8),
        "dtype": torch.float32,
    }


def decode_args() -> dict[str, Any]:
    return {
        **cache_args(),
        "q": torch.randn(2, 4, 1, 64),
        "k_window": torch.randn(2, 2, 7, 64),
        "v_window": torch.randn(2, 2, 7, 64),
        "window_positions": torch.arange(7).int().repeat(2, 1),
        "q_start": torch.tensor([200]),
        "softmax_scale": 0.1,
        "sliding_window": 0,
    }


def mass_args() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 4, 3, 64),
        "k": torch.randn(2, 2, 9, 64),
        "k_positions": torch.arange(9).int().repeat(2, 1),
        "q_start": torch.tensor([6]),
        "softmax_scale": 0.1,
        "sliding_window": 0,
        "lse": torch.zeros(2, 4, 3),
    }


def merge_args() -> dict[str, Any]:
    return {"o": torch.randn(3, 5, 64), "lse": torch.randn(3, 5)}


def select_args() -> dict[str, Any]:
    return {
        "scores": torch.randn(2, 3, 9),
        "current": torch.zeros(2, 3, 9, dtype=torch.int8),
        "budgets": torch.tensor([10000, 10000]),
        "page_bytes": [1000, 2000],
        "distortion": [0.1, 0.01],
    }


def gate_args() -> dict[str, Any]:
    return {
        "keys": [torch.randn(2, 3, 9, 64) for _ in range(2)],
        "weights": [torch.randn(2, 3, 16, 64), torch.randn(2, 3, 1, 16)],
        "biases": [torch.randn(2, 3, 16), torch.randn(2, 3, 1)],
    }


def basis_args() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 6, 9, 64), "matrix": torch.randn(3, 64, 64), "origin": torch.randn(3, 64),
        "shift": torch.randn(3, 64),
    }  # fmt: skip


MAKE: dict[str, Callable[[], dict[str, Any]]] = {
    "quantize_kv": quantize_args,
    "dequantize_kv": dequantize_args,
    "append_kv": append_args,
    "compact_kv": compact_args,
    "decode_attention": decode_args,
    "attention_mass": mass_args,
    "merge_states": merge_args,
    "select_kv": select_args,
    "gate_score": gate_args,
    "change_basis": basis_args,
}


def at(name: str, index: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Change one element of an argument."""

    def change(args: dict[str, Any]) -> Any:
        out = args[name].clone() if isinstance(args[name], torch.Tensor) else list(args[name])
        out[index] = value
        return out

    return change


def of(name: str, fn: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda args: fn(args[name])


def misaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.numel() + 2, dtype=torch.uint8)[2:].view(x.shape)


def name_of(case: Any) -> str:
    return case if isinstance(case, str) and case.isidentifier() else ""


@cache
def accepts(op: str) -> None:
    """The arguments are good but for the one that a case changes."""
    getattr(ops, op)(**MAKE[op]())


def check_refusal(op: str, argument: str, bad: Any, error: type[Exception], message: str) -> None:
    """`bad` replaces the argument, or makes a bad value from all arguments. No mutable one may change."""
    args = MAKE[op]()
    accepts(op)
    args[argument] = bad(args) if callable(bad) and not isinstance(bad, torch.Tensor) else bad
    before = {
        name: [x.clone() for x in ([value] if isinstance(value, torch.Tensor) else value)]
        for name, value in args.items()
        if name in ("pools", "cache_seqlens")
    }
    with pytest.raises(error, match=re.escape(message)):
        getattr(ops, op)(**args)
    for name, copies in before.items():
        for x, copy in zip([args[name]] if isinstance(args[name], torch.Tensor) else args[name], copies, strict=True):
            assert torch.equal(x, copy), f"{name} was changed by a refused call"
