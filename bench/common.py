"""Timing, the machine's read bandwidth, and how results are printed."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

COLD_BYTES = 1 << 29  # rotate over at least this much memory, so that no cache level holds the next operand


def copies_for_cold_cache(num_bytes: int) -> int:
    """How many copies of an operand of num_bytes make every access cold."""
    return max(2, min(64, -(-COLD_BYTES // max(num_bytes, 1))))


def median_seconds(calls: Sequence[Callable[[], Any]], seconds: float = 1.0) -> float:
    """Median time of one call; the calls (same work, different operands) take turns for about ``seconds``."""
    for call in calls[:2]:
        call()
    times: list[float] = []
    begin = time.perf_counter()
    for call in itertools.cycle(calls):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        times.append(end - start)
        if end - begin > seconds and len(times) >= 5:
            return statistics.median(times)
    raise AssertionError("unreachable")


def read_bandwidth() -> float:
    """Bytes per second that a sum over cold memory reads, on torch's threads: the floor of everything memory-bound."""
    buffers = [torch.ones(1 << 26) for _ in range(4)]
    return buffers[0].nbytes / median_seconds([buffer.sum for buffer in buffers])


def show(title: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """A table for people, then one line of JSON for programs."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=150).print(table)
    print(json.dumps(result), flush=True)
