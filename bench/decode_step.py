"""Milliseconds per decoded token after a long prefill: DynamicCache against SmartKV at several budgets, taking turns.

python -m bench.decode_step --model smollm2 --prefill 2048
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer
from transformers import DynamicCache

import smartkv_ext
from bench.models import load, text_ids
from bench.output import show
from smartkv_ext import SmartKVCache


def main(
    model: str = "smollm2",
    dtype: str = "float32",
    prefill: int = 2048,
    steps: int = 48,
    rounds: int = 4,
    budgets: Annotated[list[str], typer.Option()] = ["0.5", "0.25", "0.125"],  # noqa: B006
    policy: str = "keydiff",
    threads: int = 2,
) -> None:
    """Print a table and one JSON line. Every cache decodes the same tokens; maintenance (packing) is included."""
    torch.set_num_threads(threads)
    network, tokenizer = load(model, dtype)
    ids = text_ids(tokenizer, prefill + steps * rounds)
    caches: dict[str, object] = {"DynamicCache": DynamicCache()}
    caches |= {f"SmartKV {b}": SmartKVCache(network.config, budget=b, policy=policy) for b in budgets}
    times: dict[str, list[float]] = {name: [] for name in caches}
    prefill_seconds = {}
    with torch.no_grad():
        for name, cache in caches.items():
            with smartkv_ext.patch(network):
                start = time.perf_counter()
                network(ids[:, :prefill], past_key_values=cache, logits_to_keep=1)
                prefill_seconds[name] = time.perf_counter() - start
        for turn in range(rounds):
            for name, cache in caches.items():
                plain = isinstance(cache, DynamicCache)
                handle = None if plain else smartkv_ext.patch(network)
                for step in range(steps):
                    token = prefill + turn * steps + step
                    start = time.perf_counter()
                    network(ids[:, token : token + 1], past_key_values=cache)
                    times[name].append(time.perf_counter() - start)
                if handle:
                    handle.remove()
    base = statistics.mean(times["DynamicCache"])
    rows = []
    for name, cache in caches.items():
        mean = statistics.mean(times[name])
        if isinstance(cache, DynamicCache):
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        else:
            size = cache.report().total_bytes
        rows.append({
            "cache": name, "prefill_s": prefill_seconds[name], "ms_per_token": mean * 1e3,
            "median_ms": statistics.median(times[name]) * 1e3, "speedup": base / mean, "bytes": size,
        })  # fmt: skip
    show(
        f"{model} {dtype}, {prefill} tokens before, {steps * rounds} decoded, {threads} threads", rows, {"caches": rows}
    )


if __name__ == "__main__":
    typer.run(main)
