"""Mask function: hand the 2D padding mask through. Causality and windows come from logical positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from smartkv_ext.cache.forward import running


def smartkv_mask(
    *args: Any, attention_mask: torch.Tensor | None = None, kv_length: int | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """The (batch, kv_length) bool padding mask, or None where nothing is padded; without a SmartKVCache, sdpa's mask.

    Registered under the attention's own name: without it transformers would pass no mask at all, and left padding
    would be ignored without a word. The function is not told which cache the forward has.
    """
    forward = running.get()
    # Behind an interrupt a forward may seem to run on: another model's masks are none of its business.
    if forward is None or getattr(forward.decoder, "config", None) is not kwargs.get("config"):
        mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            *args, attention_mask=attention_mask, kv_length=kv_length, **kwargs
        )
        return mask
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if kv_length is None or mask.dim() != 2:  # others are refused by the attention function
        return mask
    if mask.shape[-1] < kv_length:  # transformers takes what is missing for padding, and loses the new tokens
        raise ValueError(
            f"attention_mask must have a column for each of the {kv_length} tokens so far, in the cache and new; "
            f"got {mask.shape[-1]}"
        )
    return mask[:, :kv_length]


def dense_mask(
    padding: torch.Tensor | None, q_len: int, kv_len: int, sliding_window: int, device: torch.device
) -> torch.Tensor | None:
    """(batch or 1, 1, q_len, kv_len) bool for sdpa; None where sdpa's own causal mask says the same.

    Every query may see itself, padding included: a row that sees nothing would become NaN, and NaN times zero is NaN
    in the next layer.
    """
    if padding is None and q_len == kv_len and not (0 < sliding_window < kv_len):
        return None
    q = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    k = torch.arange(kv_len, device=device)
    mask = k <= q
    if sliding_window > 0:
        mask &= k > q - sliding_window
    mask = mask[None, None]
    if padding is not None:
        mask = (mask & padding[:, None, None, -kv_len:]) | (k == q)
    return mask
