"""Decode steps as CUDA graphs: recorded once per packing interval, replayed for every token in between."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from smartkv_ext.cache import SmartKVCache

# Carries a call out once and returns its result with what carries it out again, on the same memory.
Recorder = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]


class CudaGraphRecorder:
    """Captures a call that has run before, and replays the graph. All graphs share one memory pool: only the newest may
    be replayed.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._keeper = torch.cuda.CUDAGraph()  # a pool whose last graph is gone may not be shared any more
        with torch.cuda.graph(self._keeper, stream=self._stream):
            torch.zeros(1, device="cuda")

    def __call__(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        # Not torch.cuda.graph(), which collects garbage and empties the allocator's cache each time.
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        gc.disable()  # what a collection frees may be what no capture allows
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._keeper.pool())
                try:
                    out = call()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph.replay()  # capturing has launched nothing
        return out, graph.replay


class ReplayedDecoder:
    """One-token steps of a patched model behind a prefill, without the cost of launching them from Python.

    A step that packs runs as usual and lets go of the graph, since pools and windows are then allocated anew; the next
    but one is recorded, and the ones that follow replay it. Nothing else may write to ``cache`` meanwhile.

    Args:
        model: patched, in eval mode, on one device.
        cache: holds the prompt.
        position_ids: (batch, 1) int64 of the next token; default: the number of tokens seen. With left padding they are
            smaller by the padding. New tokens are never padding.
        record: default: CUDA graphs.

    Raises:
        ValueError: the cache is empty, or not on a CUDA device and nothing else is given to record.
    """

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
        if record is None and device.type != "cuda":
            raise ValueError(f"cache must be on a CUDA device: steps are replayed as CUDA graphs; got {device}")
        self._model, self._cache = model, cache
        self._record = CudaGraphRecorder() if record is None else record
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.full((batch, 1), seen, device=device) if position_ids is None else position_ids.clone()
        self._kind: tuple[bool, ...] | None = None
        self._is_warm = False  # a step has run since the last packing: libraries have what they allocate
        self._recorded: tuple[torch.Tensor, Callable[[], None]] | None = None

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocabulary) of the token behind ``ids`` (batch, 1); overwritten by the next step."""
        self._ids.copy_(ids)
        kind = self._cache.step_kind()
        if kind is None or kind != self._kind:
            self._recorded, self._kind = None, kind
        if self._recorded is not None:
            self._recorded[1]()
            self._cache.follow()
            logits = self._recorded[0]
        elif kind is not None and self._is_warm:
            self._recorded = self._record(self._forward)
            logits = self._recorded[0]
        else:
            logits = self._forward()
        self._is_warm = kind is not None
        self._positions += 1
        return logits

    def _forward(self) -> torch.Tensor:
        logits: torch.Tensor = self._model(
            input_ids=self._ids, position_ids=self._positions, past_key_values=self._cache, use_cache=True
        ).logits
        return logits[:, -1]
