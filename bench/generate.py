"""Prefill and decode tokens per second, and memory, of a real model with several caches.

python -m bench.generate --model smollm2 --context 2048 4096 8192 --out results.jsonl
python -m bench.generate --model FOLDER --dtype bfloat16 --context 8192 --cache dynamic --cache smartkv:0.125

Every cache sees the same text and decodes the same tokens, on a CPU in two processes of its own: one is timed, the
other's memory is watched. With --out, each measurement is appended to a JSON-lines file; what is already there is not
measured again, so an interrupted run continues. Only what was measured while other processes used the CPU is measured
anew, and the newer line counts. quanto, hqq and fp8 are the backends of transformers' QuantizedCache (pip install
optimum-quanto hqq).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from bench import options
from bench.caches import DEFAULT, KINDS, label
from bench.generate_task import Task
from bench.output import show
from bench.session import check_device
from bench.timing import CALM


def run_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure speed, then memory; a failure becomes the field ``error``. On a CPU each in a new process, for what one
    leaves in the heap would be the other's memory; on a GPU in this one, since torch counts there, and starting costs.
    """
    if settings.get("device", "cpu") != "cpu":
        try:
            task = Task.of(settings)
            return task.speed() | task.memory()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    result: dict[str, Any] = {}
    for part in ("speed", "memory"):
        command = [sys.executable, "-m", "bench.generate_task", part, json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
        result |= json.loads(done.stdout.splitlines()[-1])
    return result


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
    """The table shows peaks of memory in MB, packing as a share of decoding, and Python in us per layer call; the JSON
    line has everything."""
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
            "held MB": megabytes(row, "held_bytes"), "prefill MB": megabytes(row, "prefill_peak_bytes"),
            "decode MB": megabytes(row, "decode_peak_bytes"), "packing": percent(row, "maintenance_share"),
            "python us": row.get("python_us"),
        }
        for row in rows
    ]  # fmt: skip
    for row in rows if not json_only else ():
        if "error" in row:
            print(f"{row['cache']}, context {row['context']}: {row['error']}")
        elif row["others_cpu"] > CALM:
            print(f"{row['cache']}, context {row['context']}: others took {row['others_cpu']:.0%} of the CPU")
    show(title, shown, {"title": title, "rows": rows}, json_only)


def main(
    contexts: Annotated[list[int] | None, typer.Argument(hidden=True)] = None,
    model: Annotated[str, typer.Option(help="smollm2, random, a folder, or a hub id")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "float32",
    context: Annotated[list[int], typer.Option(help="tokens before decoding; several may follow")] = [2048],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=4, help="tokens to decode")] = 64,
    cache: Annotated[list[str], typer.Option(help=KINDS)] = DEFAULT,
    policy: Annotated[str, typer.Option(help="of SmartKV")] = "auto",
    chunk: Annotated[int, typer.Option(min=0, help="tokens per forward of the prefill, 0: all")] = 0,
    limit: Annotated[float, typer.Option(help="seconds after which decoding stops early")] = 120.0,
    repeats: Annotated[int, typer.Option(min=1, help="measurements of each, in turns; medians are shown")] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    device: options.Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON-lines file to append to and to continue from")] = None,
    json_only: Annotated[bool, typer.Option("--json", help="print the JSON line alone")] = False,
) -> None:
    """Print a table, the errors of caches that cannot run here, and one JSON line."""
    check_device("decode_attention", device)
    shared = {
        "model": model, "dtype": dtype, "tokens": tokens, "chunk": chunk, "policy": policy, "limit": limit,
        "threads": threads,
    } | ({} if device == "cpu" else {"device": device})  # fmt: skip
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
    where = f"{threads} threads" if device == "cpu" else torch.cuda.get_device_name()
    if entries:
        print_results(f"{model} {dtype}, {tokens} tokens decoded, {where}", entries, json_only)
    if interrupted:
        again = "the same command continues" if out else "with --out the same command would continue"
        print(f"interrupted: {again}", file=sys.stderr)
        raise typer.Exit(130)


if __name__ == "__main__":
    typer.run(main)
