"""The first half of a layer's step: update() makes sure that the attention function will bring the keys back.

Imported when a forward runs: ``torch.compiler.disable`` imports the compiler, which takes as long as torch itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .forward import running

if TYPE_CHECKING:
    from .cache import SmartKVCache

NOT_PATCHED = (
    "SmartKVCache needs a patched model: make it with the model itself, SmartKVCache(model, ...), or call "
    "smartkv_ext.patch(model) first"
)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the first call allocates
def begin_update(cache: SmartKVCache, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> None:
    """Before a layer's new keys and values (batch, num_kv_heads, q_len, head_dim) are handed on.

    Raises RuntimeError where the model is not patched, ValueError for a layer that the cache does not have.
    """
    forward = running.get()
    if forward is None or forward.cache is not cache:
        raise RuntimeError(NOT_PATCHED)
    if forward.waiting:
        raise RuntimeError(f"layer {layer_idx}: the layer before it did not use the attention that patch() chose")
    if layer_idx >= len(cache.layers):
        raise ValueError(f"the cache was made for {len(cache.layers)} layers; the model has a layer {layer_idx}")
    cache.layers[layer_idx].begin(k.to(v.dtype), v)  # under autocast RoPE gives float32 keys beside values of less
    forward.waiting = True
