"""The caches that generate compares, by name."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, QuantizedCache

from bench.layer_times import TimedCache
from smartkv_ext import SmartKVCache

KINDS = (
    'dynamic, quanto:BITS, hqq:BITS, fp8, smartkv:BUDGET such as "smartkv:0.125", or smartkv-graph:BUDGET (CUDA graphs)'
)
DEFAULT = ["dynamic", "quanto:4", "quanto:2", "hqq:4", "hqq:2", "fp8", "smartkv:0.5", "smartkv:0.25", "smartkv:0.125"]


def make_cache(kind: str, config: Any, policy: str = "auto") -> Any:
    """A new cache. Raises ValueError for an unknown kind, and what transformers raises where a backend is missing.

    QuantizedCache keeps its own defaults: groups of 64, 128 recent tokens unquantised. Axes as its documentation
    recommends: 0 for quanto, 1 for hqq.
    """
    name, _, value = kind.partition(":")
    if name == "dynamic":
        return DynamicCache(config=config)
    if name == "smartkv" and value:
        return TimedCache(config, budget=value, policy=policy)
    if name == "smartkv-graph" and value:
        return SmartKVCache(config, budget=value, policy=policy)
    if name == "fp8":
        return QuantizedCache("fp8", config)
    if name in ("quanto", "hqq") and value:
        axis = 0 if name == "quanto" else 1
        return QuantizedCache(name, config, nbits=int(value), axis_key=axis, axis_value=axis)
    raise ValueError(f"cache must be {KINDS}; got {kind!r}")


def label(kind: str) -> str:
    """For tables: "DynamicCache", "quanto 4", "SmartKV 0.125"."""
    names = {"dynamic": "DynamicCache", "smartkv": "SmartKV", "smartkv-graph": "SmartKV, graphs,"}
    name, _, value = kind.partition(":")
    return f"{names.get(name, name)} {value}".strip()
