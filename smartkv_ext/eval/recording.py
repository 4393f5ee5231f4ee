"""A prefill that is computed once and then given to any number of caches.

The first forward of a document is exact in every method: all tokens see each other before anything is packed. So its
queries, keys and values are the same for all, and a method costs no more than its own compression.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import Cache

from smartkv_ext.cache import SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import Policy, TokenView


@dataclass(frozen=True)
class _KeepEverything(Policy):
    """Never asked for a score: the window is as long as the text."""

    name: ClassVar[str] = "keep_everything"
    needs_pre_rope_keys: ClassVar[bool] = True
    decode_queries: ClassVar[int] = 2**31  # all of them

    def score(self, view: TokenView) -> torch.Tensor:
        raise AssertionError("nothing leaves the window")


@dataclass(frozen=True)
class LayerRecording:
    """q (batch, num_heads, n, head_dim); k, v, pre_rope (batch, num_kv_heads, n, head_dim), model dtype. q and k are
    rotated, ``pre_rope`` are the keys before."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pre_rope: torch.Tensor


@dataclass(frozen=True)
class Recording:
    """One prefill: its layers, ids (1, n), and log-probabilities of the token after it (vocab,) float32."""

    ids: torch.Tensor
    layers: list[LayerRecording]
    softmax_scale: float
    next_token: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefill."""
        return self.ids.shape[1]

    def save(self, path: Path) -> None:
        """Write to one safetensors file, which appears only when it is complete."""
        tensors = {"ids": self.ids, "next_token": self.next_token, "softmax_scale": torch.tensor(self.softmax_scale)}
        for i, layer in enumerate(self.layers):
            tensors |= {f"{i}.{field.name}": getattr(layer, field.name).contiguous() for field in fields(layer)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what ``save`` wrote."""
        tensors = load_file(path)
        names = [field.name for field in fields(LayerRecording)]
        layers = [
            LayerRecording(**{name: tensors[f"{i}.{name}"] for name in names})
            for i in range(len(tensors) // len(names))
        ]
        return cls(tensors["ids"], layers, tensors["softmax_scale"].item(), tensors["next_token"])


@torch.no_grad()
def record(model: Any, ids: torch.Tensor) -> Recording:
    """Run ids (1, n), n > 1, through a patched model."""
    if ids.shape[1] < 2:
        raise ValueError(f"a document must have at least 2 tokens; got {ids.shape[1]}")
    cache = SmartKVCache(
        model.config, budget=None, policy=_KeepEverything(), sinks=0, window=ids.shape[1] + 1, key_basis=False
    )
    logits = model(ids, **cache_kwargs(cache), use_cache=True, logits_to_keep=1).logits
    layers = []
    for layer in cache.layers:
        assert layer.queries is not None, "the policy asks for them"
        held = {name: layer.window.held(name).clone() for name in ("k", "v", "pre_rope")}
        layers.append(LayerRecording(q=layer.queries, **held))
    return Recording(ids, layers, cache.layers[0].softmax_scale, logits[0, -1].float().log_softmax(-1))


@torch.no_grad()
def replay(recording: Recording, cache: Cache) -> None:
    """Bring an empty cache into the state that the recorded forward would have left it in."""
    for i, layer in enumerate(recording.layers):
        if not isinstance(cache, SmartKVCache):
            cache.update(layer.k, layer.v, i)
            continue
        held = cache.layers[i]
        held.begin(layer.k, layer.v)
        held.append(layer.k, layer.v, layer.pre_rope, None)
        held.remember_queries(layer.q)
        held.measure_prefill(layer.q, recording.softmax_scale)
        cache.after_attention(i, recording.softmax_scale)
