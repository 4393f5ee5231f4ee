"""Prefill and decode tokens per second, and memory, of a real model with several caches.

python -m bench.generate --model smollm2 --context 2048 4096 8192 --out results.jsonl
python -m bench.generate --model FOLDER --dtype bfloat16 --context 8192 --cache dynamic --cache smartkv:0.125

Every cache sees the same text and decodes the same tokens, in a process of its own. With --out, each measurement is
appended to a JSON-lines file; what is already in the file is not measured again, so an interrupted run continues. Only
what was measured while other processes used the CPU is measured anew, and the newer line counts.
quanto, hqq and fp8 are the backends of transformers' QuantizedCache (pip install optimum-quanto hqq).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import smartkv_ext
from bench.caches import DEFAULT, KINDS, label, make_cache
from bench.layer_times import TimedCache, attention_clock
from bench.models import load, text_ids
from bench.output import show
from bench.resident import peak_bytes, settle
from bench.timing import CALM, cpu_seconds_of_others
from smartkv_ext import SmartKVCache

WARM_UP = 96  # tokens
PROBE = 8  # tokens decoded at the end with clocks around the attention modules


def prefill(network: Any, cache: Any, ids: torch.Tensor, chunk: int) -> float:
    """Seconds to feed ids (1, n); ``chunk``: tokens per forward, 0: all at once."""
    start = time.perf_counter()
    for part in ids.split(chunk or ids.shape[1], dim=1):
        network(part, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


def decode(network: Any, cache: Any, ids: torch.Tensor, limit: float) -> tuple[list[float], float]:
    """(seconds of each step, mean negative log-likelihood of the true next tokens) for ids (1, n), n - 1 steps.

    Stops after ``limit`` seconds, but not before four steps.
    """
    times: list[float] = []
    losses = []
    for i in range(ids.shape[1] - 1):
        start = time.perf_counter()
        logits = network(ids[:, i : i + 1], past_key_values=cache).logits[0, -1]
        times.append(time.perf_counter() - start)
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, i + 1]).item())
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


@torch.no_grad()
def measure(
    kind: str, model: str, dtype: str, context: int, tokens: int, chunk: int, policy: str, limit: float
) -> dict[str, Any]:
    """Everything about one cache at one context, in this process. Memory is growth of the resident set."""
    network, tokenizer = load(model, dtype)
    ids = text_ids(tokenizer, context + tokens + PROBE + 1)
    with contextlib.ExitStack() as stack:
        if kind.startswith("smartkv"):
            stack.enter_context(smartkv_ext.patch(network))
        warm = make_cache(kind, network.config, policy)  # thread pools, work buffers, backends that compile themselves
        prefill(network, warm, ids[:, :WARM_UP], 0)
        decode(network, warm, ids[:, WARM_UP : WARM_UP + 4], limit)
        del warm
        before = settle()
        cache = make_cache(kind, network.config, policy)
        prefill_seconds = prefill(network, cache, ids[:, :context], chunk)
        prefill_peak = peak_bytes() - before
        settle()
        if isinstance(cache, TimedCache):
            cache.reset_clocks()
            stack.enter_context(cache.timed_ops())
        wall, others = time.perf_counter(), cpu_seconds_of_others()
        times, nll = decode(network, cache, ids[:, context : context + tokens + 1], limit)
        wall, others = time.perf_counter() - wall, cpu_seconds_of_others() - others
        decode_peak = peak_bytes() - before
        shares = cache.shares(sum(times)) if isinstance(cache, TimedCache) else {}
        resident = settle() - before
        spent = []
        start = context + len(times)
        for i in range(start, start + PROBE):
            with attention_clock(network) as clock:
                network(ids[:, i : i + 1], past_key_values=cache)
            spent.append(clock[0])
    return {
        "prefill_tokens_per_s": context / prefill_seconds,
        "decode_tokens_per_s": len(times) / sum(times),
        "median_ms": statistics.median(times) * 1e3,
        "attention_ms": statistics.median(spent) * 1e3,
        "decoded": len(times),
        "nll": nll,
        "prefill_peak_bytes": prefill_peak,
        "decode_peak_bytes": decode_peak,
        "resident_bytes": resident,
        "held_bytes": held_bytes(cache),
        "others_cpu": max(others, 0.0) / wall / (os.cpu_count() or 1),
        **shares,
    }


def run_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure in a new process; a failure becomes the field ``error``."""
    command = [sys.executable, "-m", "bench.generate", "--worker", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1] if lines else f"exit status {done.returncode}"}


def summarise(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per (context, cache), medians over repeats; ``speedup``: of decoding, over DynamicCache at that context."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in entries:
        settings = entry["settings"]
        groups.setdefault((settings["context"], settings["kind"]), []).append(entry["result"])
    rows = []
    for (context, kind), results in sorted(groups.items(), key=lambda item: item[0][0]):
        row: dict[str, Any] = {"cache": label(kind), "context": context}
        good = [result for result in results if "error" not in result]
        for name in good[0] if good else ():
            row[name] = None if good[0][name] is None else statistics.median(x[name] for x in good)
        if not good:
            row["error"] = results[-1]["error"]
        rows.append(row)
    for row in rows:
        base = [x for x in rows if x["cache"] == "DynamicCache" and x["context"] == row["context"] and "error" not in x]
        if base and "error" not in row:
            row["speedup"] = row["decode_tokens_per_s"] / base[0]["decode_tokens_per_s"]
    return rows


def print_results(title: str, entries: list[dict[str, Any]], json_only: bool) -> None:
    """The table shows megabytes and percent; the JSON line has everything."""
    rows = summarise(entries)

    def megabytes(row: dict[str, Any], name: str) -> str | None:
        return None if row.get(name) is None else f"{row[name] / 1e6:,.0f}"

    def percent(row: dict[str, Any], name: str) -> str | None:
        return None if row.get(name) is None else f"{row[name]:.1%}"

    shown = [
        {
            "cache": row["cache"], "context": str(row["context"]),
            "prefill tok/s": row.get("prefill_tokens_per_s"), "decode tok/s": row.get("decode_tokens_per_s"),
            "speedup": row.get("speedup"), "attention ms": row.get("attention_ms"), "nll": row.get("nll"),
            "held MB": megabytes(row, "held_bytes"), "prefill peak MB": megabytes(row, "prefill_peak_bytes"),
            "decode peak MB": megabytes(row, "decode_peak_bytes"), "packing": percent(row, "maintenance_share"),
            "python us": row.get("python_us"), "others' cpu": percent(row, "others_cpu"),
        }
        for row in rows
    ]  # fmt: skip
    for row in rows if not json_only else ():
        if "error" in row:
            print(f"{row['cache']}, context {row['context']}: {row['error']}")
    show(title, shown, {"title": title, "rows": rows}, json_only)


def main(
    contexts: Annotated[list[int] | None, typer.Argument(hidden=True)] = None,
    model: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "float32",
    context: Annotated[list[int], typer.Option(help="tokens before decoding; several may follow")] = [2048],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=4, help="tokens to decode")] = 64,
    cache: Annotated[list[str], typer.Option(help=KINDS)] = DEFAULT,
    policy: Annotated[str, typer.Option(help="of SmartKV")] = "keydiff",
    chunk: Annotated[int, typer.Option(min=0, help="tokens per forward of the prefill, 0: all")] = 0,
    limit: Annotated[float, typer.Option(help="seconds after which decoding stops early")] = 120.0,
    repeats: Annotated[int, typer.Option(min=1, help="measurements of each, in turns; medians are shown")] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON-lines file to append to and to continue from")] = None,
    json_only: Annotated[bool, typer.Option("--json", help="print the JSON line alone")] = False,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print a table, the errors of caches that cannot run here, and one JSON line."""
    if worker:
        settings = json.loads(worker)
        torch.set_num_threads(settings.pop("threads"))
        settings.pop("repeat")
        print(json.dumps(measure(**settings)))
        return
    shared = {
        "model": model, "dtype": dtype, "tokens": tokens, "chunk": chunk, "policy": policy, "limit": limit,
        "threads": threads,
    }  # fmt: skip
    todo = [
        shared | {"context": length, "kind": kind, "repeat": turn}
        for length in dict.fromkeys([*context, *(contexts or [])])
        for turn in range(repeats)
        for kind in cache
    ]
    known = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    newest = {json.dumps(entry["settings"]): entry for entry in known if entry["settings"] in todo}
    entries = [entry for entry in newest.values() if entry["result"].get("others_cpu", 0.0) <= CALM]
    finished = [entry["settings"] for entry in entries]
    interrupted = False
    with tqdm(todo, unit="run") as progress:
        try:
            for settings in progress:
                progress.set_description(f"{settings['kind']} {settings['context']}")
                if settings in finished:
                    continue
                entries.append({"settings": settings, "result": run_worker(settings)})
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps(entries[-1]) + "\n")
        except KeyboardInterrupt:
            interrupted = True
    if entries:
        print_results(f"{model} {dtype}, {tokens} tokens decoded, {threads} threads", entries, json_only)
    if interrupted:
        again = "the same command continues" if out else "with --out the same command would continue"
        print(f"interrupted: {again}", file=sys.stderr)
        raise typer.Exit(130)


if __name__ == "__main__":
    typer.run(main)
