"""Decode steps as CUDA graphs: recorded once per packing interval, replayed for every token in between."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from smartkv_ext.cache import SmartKVCache

from .compat import cache_kwargs

# Carries a call out once and returns its result with what carries it out again, on the same memory.
Recorder = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]

ERROR_MODE = "thread_local"  # "global": whatever allocates in another thread would fail, and the capture with it


class CudaGraphRecorder:
    """Captures a call that has run before, and replays the graph. All graphs share one memory pool: only the newest may
    be replayed. Other threads may use the device meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._keeper: torch.cuda.CUDAGraph | None = self._new_pool()

    def _new_pool(self) -> torch.cuda.CUDAGraph:
        """A graph of its own: a pool whose last graph is gone may not be shared any more."""
        keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(keeper, stream=self._stream, capture_error_mode=ERROR_MODE):
            torch.zeros(1, device=self._device)
        return keeper

    def __call__(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):  # else its current stream, which captures nothing, would take the work
            if self._keeper is None:
                self._keeper = self._new_pool()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                out = self._capture(graph, call, self._keeper)
            torch.cuda.current_stream().wait_stream(self._stream)
        graph.replay()  # capturing has launched nothing
        return out, graph.replay

    def _capture(
        self, graph: torch.cuda.CUDAGraph, call: Callable[[], torch.Tensor], keeper: torch.cuda.CUDAGraph
    ) -> torch.Tensor:
        """Not torch.cuda.graph(), which collects garbage and empties the allocator's cache each time."""
        collects = gc.isenabled()
        gc.disable()  # what a collection frees may be what no capture allows
        try:
            graph.capture_begin(pool=keeper.pool(), capture_error_mode=ERROR_MODE)
            try:
                out = call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it would only say that the capture has failed
                    self._end(graph, keeper)
                raise
            self._end(graph, keeper)
        finally:
            if collects:
                gc.enable()
        return out

    def _end(self, graph: torch.cuda.CUDAGraph, keeper: torch.cuda.CUDAGraph) -> None:
        """Where the driver has given the capture up, torch raises before it ends allocation to the pool: nothing could
        be captured with it again, nor memory be freed that several streams have used (torch.cuda.use_mem_pool ends it
        by the same calls).
        """
        try:
            graph.capture_end()
        except RuntimeError:
            self._keeper = None
            with contextlib.suppress(RuntimeError):  # it had ended
                device = torch.cuda.current_device()
                torch._C._cuda_endAllocateToPool(device, keeper.pool())
                torch._C._cuda_releasePool(device, keeper.pool())
            raise


class ReplayedDecoder:
    """One-token steps of a patched model behind a prefill, without the cost of launching them from Python.

    A step that packs runs as usual and lets go of the graph, since pools and windows are then allocated anew; the next
    but one is recorded, and the ones that follow replay it. A step that fails leaves the cache as it was.

    Args:
        model: patched, in eval mode, on one device, not compiled (a compiler could start in a step that is recorded).
        cache: holds the prompt. While this decodes nothing else may write to it.
        position_ids: (batch, 1) of the next token; default: the number of tokens seen. With left padding they are
            smaller by the padding. New tokens are never padding.
        record: default: CUDA graphs.

    Raises:
        ValueError: the cache is empty, on several devices, or not on a CUDA device and nothing else is given to
            record; the shape of ``position_ids``.
    """

    @torch.inference_mode(False)  # inference tensors could not be written to by steps outside of that mode
    def __init__(
        self,
        model: PreTrainedModel,
        cache: SmartKVCache,
        position_ids: torch.Tensor | None = None,
        record: Recorder | None = None,
    ) -> None:
        seen = int(cache.get_seq_length())
        if seen == 0:
            raise ValueError("cache must hold the prompt: call the model with it first")
        batch, device = cache.layers[0].batch_size, cache.layers[0].device
        devices = sorted({str(layer.device) for layer in cache.layers})
        if len(devices) > 1:
            raise ValueError(f"cache must be on one device, where steps are replayed; got {', '.join(devices)}")
        if record is None and device.type != "cuda":
            raise ValueError(f"cache must be on a CUDA device: steps are replayed as CUDA graphs; got {device}")
        if position_ids is not None and position_ids.shape != (batch, 1):
            raise ValueError(f"position_ids must be ({batch}, 1); got {tuple(position_ids.shape)}")
        self._model, self._cache = model, cache
        self._record = CudaGraphRecorder(device) if record is None else record
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.full_like(self._ids, seen)
        if position_ids is not None:
            self._positions.copy_(position_ids)
        self._mark = cache.state_mark
        self._forget()

    def _forget(self) -> None:
        self._kind: tuple[bool, ...] | None = None
        self._is_warm = False  # a step has run since the last packing: libraries have what they allocate
        self._recorded: tuple[torch.Tensor, Callable[[], None]] | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocabulary) of the token behind ``ids`` (batch, 1); overwritten by the next step.

        Raises:
            ValueError: the shape of ``ids``.
            RuntimeError: something else has written to the cache.
        """
        if ids.shape != self._ids.shape:
            raise ValueError(f"ids must be {tuple(self._ids.shape)}; got {tuple(ids.shape)}")
        if self._cache.state_mark != self._mark:
            raise RuntimeError("something else has written to the cache: begin with a new ReplayedDecoder")
        seen = self._mark[1]
        try:
            self._ids.copy_(ids)
            logits = self._advance()
        except BaseException:
            self._forget()
            self._cache.rollback(seen)  # where it cannot, it empties the cache and raises: the mark will not fit
            self._mark = self._cache.state_mark
            raise
        self._mark = self._cache.state_mark
        self._positions += 1
        return logits

    def _advance(self) -> torch.Tensor:
        kind = self._cache.step_kind()
        if kind is None or kind != self._kind:
            self._recorded, self._kind = None, kind
        if self._recorded is not None:
            self._recorded[1]()
            self._cache.follow()
            logits = self._recorded[0]
        elif kind is not None and self._is_warm:
            with self._cache.recorded():
                self._recorded = self._record(self._forward)
            logits = self._recorded[0]
        else:
            logits = self._forward()
        self._is_warm = kind is not None
        return logits

    def _forward(self) -> torch.Tensor:
        logits: torch.Tensor = self._model(
            input_ids=self._ids, position_ids=self._positions, use_cache=True, **cache_kwargs(self._cache)
        ).logits
        return logits[:, -1]
