"""Traces of real models: queries, keys and values of every layer, after RoPE, as attention saw them."""

from __future__ import annotations

from typing import Any

import torch

from smartkv_ext.cache.config import inverse_frequencies
from smartkv_ext.gates import Gates

from .reconstruction import Trace, make_trace
from .recording import LayerCall, recording


@torch.no_grad()
def collect(model: Any, ids: torch.Tensor, tokens: int, gates: Gates | None = None) -> list[Trace]:
    """A trace per layer of ids (batch, total): evicted after ``tokens``, judged by the queries of the rest. ``gates``
    score the keys, for policies that ask for it.
    """
    inv_freq = torch.tensor(inverse_frequencies(model.config))
    layers: list[LayerCall] = []
    with recording(model, layers.append):
        model.base_model(ids, use_cache=False)
    traces = [make_trace(x.q, x.k, x.v, tokens, i, len(layers), x.scale, inv_freq) for i, x in enumerate(layers)]
    if gates is not None:
        keys, values = zip(*((x.pre_rope[:, :, :tokens], x.v[:, :, :tokens]) for x in layers), strict=True)
        for trace, scores in zip(traces, gates.score(keys, values), strict=True):
            trace.view.key_scores = scores
    return traces
