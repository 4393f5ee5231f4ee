"""Medians of calls on cold operands."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import cuda_graphs

COLD_BYTES = 1 << 28  # operands rotate over at least this much memory, far more than any L3 or L2 of a GPU holds
MAX_COPIES = 256
TURN = 0.05  # seconds: many calls, so that the median forgets the state that another work left the caches and cores in
CALM = 0.05  # share of the machine's CPU time that others may take
SLOW = 1.0  # seconds: a call that takes longer runs three times only


@dataclass(frozen=True)
class Work:
    """The same work on separate operands, so that taking turns makes every read cold."""

    calls: list[Callable[[], Any]]
    num_bytes: int = 0  # that one call must read and write
    restore: Callable[[int], None] | None = None  # undoes call i, untimed; right after it, so that i is cold next time

    def once(self, turn: int) -> float:
        """Seconds of one call on the CPU."""
        i = turn % len(self.calls)
        seconds = _seconds(self.calls[i])
        if self.restore is not None:
            self.restore(i)
        return seconds


def copies_for_cold_cache(num_bytes: int) -> int:
    """How many copies of an operand of num_bytes make every access cold."""
    return max(2, min(MAX_COPIES, -(-COLD_BYTES // max(num_bytes, 1))))


def medians(works: Sequence[Work], seconds: float, device: torch.device) -> list[float]:
    """Median seconds per call of each of ``works``; see ``calm_medians``, which this does once."""
    return [statistics.median(spent) for spent in _samples(works, seconds, device)]


def calm_medians(works: Sequence[Work], seconds: float, device: torch.device) -> tuple[list[float], float]:
    """(median seconds per call of each of ``works``, share of the machine's CPU time that others took meanwhile).

    The works take turns, about ``seconds`` for each of them: what slows the machine down slows all of them. A parallel
    loop waits for its last thread, so one busy core can make every call ten times as long: where others took more
    than CALM, up to two more measurements are made, and the calmest one counts.
    """
    tries: list[tuple[float, list[float]]] = []
    while not tries or (tries[-1][0] > CALM and len(tries) < 3):
        start, others = time.perf_counter(), cpu_seconds_of_others()
        found = medians(works, seconds, device)
        wall = (time.perf_counter() - start) * (os.cpu_count() or 1)
        tries.append((max(cpu_seconds_of_others() - others, 0.0) / wall, found))
    share, found = min(tries)
    return found, share


def cpu_seconds_of_others() -> float:
    """CPU time since boot that was not this process's, stolen time included; 0 where the system does not tell."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    idle = ticks[3] + ticks[4]  # idle, iowait
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _samples(works: Sequence[Work], seconds: float, device: torch.device) -> list[list[float]]:
    """Seconds of every call of each of ``works``."""
    if device.type == "cuda":
        return cuda_graphs.samples(works, seconds)
    slowest = max(work.once(0) for work in works)  # the first call of each warms up and is not counted
    enough, total = (3, 0.0) if slowest > SLOW else (5, seconds * len(works))
    times: list[list[float]] = [[] for _ in works]
    while min(map(len, times)) < enough or sum(map(sum, times)) < total:
        for work, spent in zip(works, times, strict=True):
            turn = 0.0
            while turn < min(TURN, seconds):
                spent.append(work.once(len(spent) + 1))
                turn += spent[-1]
    return times


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
