"""What every benchmark of an op does the same way: check the device, find the floor, time, report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.memory_speed import cold_copies, fastest_read, ways_to_read
from bench.output import show
from bench.timing import CALM, Work, calm_medians, copies_for_cold_cache, medians
from smartkv_ext import ops


@dataclass(frozen=True)
class Times:
    """Seconds per call of works, rivals and a read, all of one stretch of time: shared machines swing."""

    works: dict[str, float]
    rivals: dict[str, float]
    bandwidth: float  # bytes per second of the fastest read
    read: str  # its name
    others_cpu: float  # share of the machine's CPU time that other processes took meanwhile

    def figures(self, name: str, num_bytes: int) -> dict[str, Any]:
        """The fields that every result has, of one work. ``speedup_vs_best_torch``: against the fastest rival."""
        seconds, floor = self.works[name], num_bytes / self.bandwidth
        best = min(self.rivals, key=lambda rival: self.rivals[rival])
        return {
            "us": seconds * 1e6,
            "bytes": num_bytes,
            "gbps": num_bytes / seconds / 1e9,
            "bandwidth_gbps": self.bandwidth / 1e9,
            "bandwidth_method": self.read,
            "floor_us": floor * 1e6,
            "floor_ratio": seconds / floor,
            "rivals_us": {rival: other * 1e6 for rival, other in self.rivals.items()},
            "best_torch": best,
            "speedup_vs_best_torch": self.rivals[best] / seconds,
            "others_cpu": self.others_cpu,
        }


@dataclass(frozen=True)
class Session:
    """One run of one benchmark. Create with ``open``."""

    op: str
    device: torch.device
    threads: int
    seconds: float
    huge_pages: bool
    json_only: bool
    plot: Path | None
    read: tuple[str, Work]  # the fastest way to read memory

    @classmethod
    def open(
        cls, op: str, device: str, threads: int, seconds: float, huge_pages: bool, json_only: bool, plot: Path | None
    ) -> Session:
        """Seed, set torch's threads and look for the fastest read. Raises SystemExit where ``op`` cannot run there."""
        check_device(op, device)
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        where = torch.device(device)
        return cls(op, where, threads, seconds, huge_pages, json_only, plot, fastest_read(where, seconds / 4))

    def copies(self, *operands: torch.Tensor) -> list[list[torch.Tensor]]:
        """Copies of operands that are used together, on the device, enough for cold reads: one list per operand."""
        count = copies_for_cold_cache(sum(x.nbytes for x in operands))
        return [cold_copies(x, count, self.device, self.huge_pages) for x in operands]

    def median(self, work: Work) -> float:
        """Median seconds of one call of work alone."""
        return medians([work], self.seconds / 2, self.device)[0]

    def rivals(self, works: Mapping[str, Work]) -> tuple[dict[str, float], Work]:
        """(seconds of each rival, one after the other; the fastest one)."""
        seconds = {name: self.median(work) for name, work in works.items()}
        return seconds, works[min(seconds, key=lambda name: seconds[name])]

    def times(self, works: Mapping[str, Work], rivals: tuple[dict[str, float], Work]) -> Times:
        """The works, the fastest rival (again) and the read take turns."""
        seconds, fastest = rivals
        name, read = self.read
        found, others = calm_medians([*works.values(), fastest, read], self.seconds, self.device)
        best = min(seconds, key=lambda other: seconds[other])
        if others > CALM:
            print(f"warning: other processes took {others:.0%} of the CPU: do not trust these figures", file=sys.stderr)
        return Times(
            works=dict(zip(works, found, strict=False)),
            rivals=seconds | {best: found[-2]},
            bandwidth=read.num_bytes / found[-1],
            read=name,
            others_cpu=others,
        )

    def context(self, **case: Any) -> dict[str, Any]:
        """What was measured, for the head of a result."""
        return {
            "op": self.op,
            "case": case,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "kernel_set": ops.kernel_set_name() if self.device.type == "cpu" else "cuda",
            "threads": self.threads,
            "huge_pages": self.huge_pages,
            **self.copy_speed(),
        }

    def copy_speed(self) -> dict[str, float]:
        """On a GPU, what copying cold memory reaches, bytes read and written together."""
        if self.device.type == "cpu":
            return {}
        work = ways_to_read(self.device)["copy"]
        return {"copy_gbps": work.num_bytes / self.median(work) / 1e9}

    def show(self, title: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Table, picture and JSON line, as the options ask."""
        where = f"{ops.kernel_set_name()}, {self.threads} threads" if self.device.type == "cpu" else "cuda"
        pages = ", 2 MB pages" if self.huge_pages else ""
        show(f"{self.op}: {title}; {where}{pages}", rows, result, self.json_only, self.plot)

    def report(self, title: str, work: Work, rivals: Mapping[str, Work], case: dict[str, Any], **rates: float) -> None:
        """Measure and show one work. ``rates``: more fields, name -> amount that is divided by the seconds."""
        times = self.times({self.op: work}, self.rivals(rivals))
        figures = times.figures(self.op, work.num_bytes)
        more = {name: amount / times.works[self.op] for name, amount in rates.items()}
        rows = [table_row(self.op, figures) | more, *rival_rows(figures)]
        self.show(title, rows, {**self.context(**case), **figures, **more})


def table_row(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """An op's row."""
    keys = ("us", "bytes", "gbps", "bandwidth_gbps", "floor_us", "floor_ratio", "speedup_vs_best_torch", "others_cpu")
    return {"method": name} | {key: figures[key] for key in keys}


def rival_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the rivals: their time, and the best rival's time over it."""
    times = figures["rivals_us"]
    best = min(times.values())
    return [{"method": f"torch: {name}", "us": us, "speedup_vs_best_torch": best / us} for name, us in times.items()]


def check_device(op: str, device: str) -> None:
    """Raise SystemExit with a sentence where ``op`` cannot run on ``device``."""
    if device not in ("cpu", "cuda"):
        raise SystemExit(f"--device must be cpu or cuda; got {device!r}")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA device here")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"smartkv::{op}", "CUDA"):
            raise SystemExit(f"--device cuda: this build has no CUDA kernel for {op}")
