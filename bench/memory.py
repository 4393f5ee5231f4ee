"""What a process really holds after a long prefill: resident memory of one process per cache kind.

python -m bench.memory --model smollm2 --prefill 8192
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import torch
import typer
from transformers import DynamicCache

import smartkv_ext
from bench.models import load, text_ids
from bench.output import show
from bench.resident import resident_bytes
from smartkv_ext import SmartKVCache


def measure(kind: str, model: str, dtype: str, prefill: int, chunk: int) -> dict[str, float]:
    """Growth of the resident set from before the prefill to after it, with the cache alive."""
    network, tokenizer = load(model, dtype)
    ids = text_ids(tokenizer, prefill)
    with torch.no_grad(), smartkv_ext.patch(network):
        network(ids[:, :64], past_key_values=DynamicCache())  # thread pools and work buffers exist from here on
        before = resident_bytes()
        cache = DynamicCache() if kind == "DynamicCache" else SmartKVCache(network.config, budget=kind)
        for start in range(0, prefill, chunk):
            network(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
        gc.collect()
        torch.ones(1).sum()
        after = resident_bytes()
    if kind == "DynamicCache":
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        held = cache.report().total_bytes
    return {"held_bytes": held, "resident_growth": after - before}


def main(model: str = "smollm2", dtype: str = "float32", prefill: int = 8192, chunk: int = 512, kind: str = "") -> None:
    """Print a table and one JSON line."""
    if kind:
        print(json.dumps(measure(kind, model, dtype, prefill, chunk)))
        return
    rows = []
    for name in ("DynamicCache", "0.25", "0.125"):
        command = [sys.executable, "-m", "bench.memory", "--model", model, "--dtype", dtype, "--kind", name]
        command += ["--prefill", str(prefill), "--chunk", str(chunk)]
        # glibc keeps freed blocks under its growing mmap threshold: fix it, so that freed means returned for both
        # caches.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        rows.append({"cache": name if name == "DynamicCache" else f"SmartKV {name}"} | json.loads(out.splitlines()[-1]))
    show(f"{model} {dtype}, {prefill} tokens in chunks of {chunk}", rows, {"caches": rows})


if __name__ == "__main__":
    typer.run(main)
