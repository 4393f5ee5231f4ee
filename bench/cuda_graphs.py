"""Times on a GPU: calls recorded in CUDA graphs, so that neither Python nor launches count, between CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

REPLAY = 0.02  # seconds that one graph of several calls may last
LEAST = 5  # samples of each work


class Work(Protocol):
    """bench.timing.Work."""

    @property
    def calls(self) -> list[Callable[[], Any]]: ...
    @property
    def restore(self) -> Callable[[int], None] | None: ...


class Recording:
    """A work as graphs of consecutive calls, so many in each that a replay is long beside what events cost; of one
    call each where the work must be restored after every call. What cannot be captured is launched call by call."""

    def __init__(self, work: Work) -> None:
        self._restore = work.restore
        self._run([0], work.calls[:1])  # loads the kernels or compiles them, which takes longer than a graph may last
        once = event_seconds(lambda: self._run([0], work.calls[:1]))
        many = 1 if work.restore else max(1, min(len(work.calls), int(REPLAY / max(once, 1e-6))))
        starts = range(0, len(work.calls), many)
        self._indices = [list(range(start, min(start + many, len(work.calls)))) for start in starts]
        self._parts = [[work.calls[i] for i in indices] for indices in self._indices]
        try:
            self._graphs: list[torch.cuda.CUDAGraph] | None = [self._capture(part) for part in self._parts]
        except RuntimeError:
            self._graphs = None
        for i in range(len(self._parts)):
            self.once(i)

    def _run(self, indices: list[int], calls: Sequence[Callable[[], Any]]) -> None:
        for call in calls:
            call()
        for i in indices if self._restore else ():
            self._restore(i)

    @staticmethod
    def _capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    @property
    def is_captured(self) -> bool:
        """False: launches count."""
        return self._graphs is not None

    def once(self, turn: int) -> float:
        """Seconds per call of the next graph."""
        i = turn % len(self._parts)
        part = self._parts[i]
        seconds = event_seconds(self._graphs[i].replay if self._graphs else lambda: [call() for call in part])
        for index in self._indices[i] if self._restore else ():
            self._restore(index)
        return seconds / len(part)


def samples(works: Sequence[Work], seconds: float) -> list[list[float]]:
    """Seconds per call of each of ``works``, which take turns for about ``seconds`` each."""
    recordings = [Recording(work) for work in works]
    times: list[list[float]] = [[] for _ in works]
    begin = time.perf_counter()
    while len(times[0]) < LEAST or time.perf_counter() - begin < seconds * len(works):
        for recording, spent in zip(recordings, times, strict=True):
            spent.append(recording.once(len(spent)))
    return times


def event_seconds(call: Callable[[], Any]) -> float:
    """Between CUDA events around ``call`` on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
