"""One cache on one model at one context: what a process of bench.generate measures.

python -m bench.generate_task speed|memory '{"kind": "dynamic", ...}'
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

import smartkv_ext
from bench.caches import make_cache
from bench.layer_times import TimedCache, attention_clock
from bench.models import load, text_ids
from bench.resident import CudaMemory, ResidentMemory
from bench.timing import cpu_seconds_of_others
from smartkv_ext import ReplayedDecoder, SmartKVCache
from smartkv_ext.hf import cache_kwargs

WARM_UP = 96  # tokens
PROBE = 8  # tokens decoded at the end with clocks around the attention modules


def now(device: torch.device) -> float:
    """Seconds on the clock once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def prefill(network: Any, cache: Any, ids: torch.Tensor, chunk: int) -> float:
    """Seconds to feed ids (1, n); ``chunk``: tokens per forward, 0: all at once."""
    start = now(ids.device)
    for part in ids.split(chunk or ids.shape[1], dim=1):
        network(part, **cache_kwargs(cache), logits_to_keep=1)
    return now(ids.device) - start


def plain_step(network: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """(1, vocabulary) logits behind ids (1, 1)."""
    logits: torch.Tensor = network(ids, **cache_kwargs(cache)).logits
    return logits[:, -1]


def decode(
    network: Any, cache: Any, ids: torch.Tensor, limit: float, graphs: bool = False
) -> tuple[list[float], float]:
    """(seconds of each step, mean negative log-likelihood of the true next tokens) for ids (1, n), n - 1 steps.

    Stops after ``limit`` seconds, but not before four steps. With ``graphs`` steps are replayed where they can be.
    """
    step = ReplayedDecoder(network, cache).step if graphs else partial(plain_step, network, cache)
    times: list[float] = []
    losses = []
    for i in range(ids.shape[1] - 1):
        start = now(ids.device)
        logits = step(ids[:, i : i + 1])
        times.append(now(ids.device) - start)
        losses.append(torch.nn.functional.cross_entropy(logits[0].float(), ids[0, i + 1]).item())
        if sum(times) > limit and len(times) >= 4:
            break
    return times, statistics.mean(losses)


def held_bytes(cache: Any) -> int | None:
    """What the cache itself says that it holds; None for QuantizedCache, whose backends do not tell."""
    if isinstance(cache, SmartKVCache):
        return cache.report().total_bytes
    if all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return None


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    kind: str
    model: str
    dtype: str
    context: int
    tokens: int
    chunk: int
    policy: str
    limit: float
    threads: int
    device: str = "cpu"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Task:
        """From what bench.generate writes; other fields are ignored."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    def prepare(self, stack: contextlib.ExitStack) -> tuple[Any, torch.Tensor]:
        """(model, ids), the model patched if the cache needs it. A short run has warmed up thread pools and work
        buffers, and backends that compile themselves."""
        network, tokenizer = load(self.model, self.dtype, self.device)
        ids = text_ids(tokenizer, self.context + self.tokens + PROBE + 1).to(self.device)
        if self.kind.startswith("smartkv"):
            stack.enter_context(smartkv_ext.patch(network))
        cache = self.cache(network)
        prefill(network, cache, ids[:, :WARM_UP], 0)
        self.decode(network, cache, ids[:, WARM_UP : WARM_UP + 4])
        return network, ids

    def cache(self, network: Any) -> Any:
        """A new one."""
        return make_cache(self.kind, network.config, self.policy)

    def decode(self, network: Any, cache: Any, ids: torch.Tensor) -> tuple[list[float], float]:
        """See the function."""
        return decode(network, cache, ids, self.limit, graphs=self.kind.startswith("smartkv-graph"))

    def next_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, tokens + 1): what is decoded, and the last true next token."""
        return ids[:, self.context : self.context + self.tokens + 1]

    @torch.no_grad()
    def speed(self) -> dict[str, Any]:
        """Tokens per second, likelihood of the text, and for SmartKV where the time goes."""
        with contextlib.ExitStack() as stack:
            network, ids = self.prepare(stack)
            cache = self.cache(network)
            prefill_seconds = prefill(network, cache, ids[:, : self.context], self.chunk)
            if isinstance(cache, TimedCache):
                cache.reset_clocks()
                stack.enter_context(cache.timed_ops())
            wall, others = time.perf_counter(), cpu_seconds_of_others()
            times, nll = self.decode(network, cache, self.next_tokens(ids))
            wall, others = time.perf_counter() - wall, cpu_seconds_of_others() - others
            shares = cache.shares(sum(times)) if isinstance(cache, TimedCache) else {}
            start, attention = self.context + len(times), []
            for i in range(start, start + PROBE) if self.device == "cpu" else ():  # clocks of the host
                with attention_clock(network) as clock:
                    network(ids[:, i : i + 1], **cache_kwargs(cache))
                attention.append(clock[0])
        return {
            "prefill_tokens_per_s": self.context / prefill_seconds,
            "decode_tokens_per_s": len(times) / sum(times),
            "median_ms": statistics.median(times) * 1e3,
            "attention_ms": statistics.median(attention) * 1e3 if attention else None,
            "decoded": len(times),
            "nll": nll,
            "others_cpu": max(others, 0.0) / wall / (os.cpu_count() or 1),
            **shares,
        }

    @torch.no_grad()
    def memory(self) -> dict[str, Any]:
        """Growth since before the prefill: peaks, and what stays. On a GPU what torch has allocated; on a CPU the
        resident set, with what malloc holds back.

        Freed memory is given back to the system before and after decoding; that makes the next steps slower, so this
        process is not the one that is timed.
        """
        with contextlib.ExitStack() as stack:
            network, ids = self.prepare(stack)
            meter = CudaMemory() if self.device == "cuda" else ResidentMemory()
            before = meter.settle()
            cache = self.cache(network)
            prefill(network, cache, ids[:, : self.context], self.chunk)
            prefill_peak = meter.peak_bytes() - before
            meter.settle()
            self.decode(network, cache, self.next_tokens(ids))
            decode_peak = meter.peak_bytes() - before
            resident = meter.settle() - before
        return {
            "prefill_peak_bytes": prefill_peak,
            "decode_peak_bytes": decode_peak,
            "resident_bytes": resident,
            "held_bytes": held_bytes(cache),
        }


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    task = Task.of(settings)
    print(json.dumps({"speed": task.speed, "memory": task.memory}[sys.argv[1]]()))
