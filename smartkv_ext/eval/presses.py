"""Presses of NVIDIA/kvpress as methods, where that package can be imported. It is a rival, not a dependency."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from smartkv_ext.hf import cache_kwargs


def press_prefill(model: Any, ids: torch.Tensor, press: str, budget: str, **options: str) -> Cache:
    """The cache that a press leaves of ids (1, n): its hooks need the hidden states, so the prefill is run again.

    kvpress counts pairs and removes ``compression_ratio`` of them: ``budget`` is what stays. Presses that only mask
    pairs keep their bytes. Raises ValueError where kvpress or the press is missing.
    """
    try:
        import kvpress  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(f"kvpress cannot be imported here: {error}") from error
    if not hasattr(kvpress, press):
        raise ValueError(f"press must be a class of kvpress; got {press!r}")
    numbers = {name: float(value) if "." in value else int(value) for name, value in options.items()}
    chosen = getattr(kvpress, press)(compression_ratio=1 - float(budget), **numbers)
    cache = DynamicCache()
    with torch.no_grad(), chosen(model):
        model(ids, **cache_kwargs(cache), use_cache=True, logits_to_keep=1)
    return cache
