"""Keys before their rotation, caught where the model makes them: at k_norm (Qwen3), else at k_proj. Exact bits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from smartkv_ext.cache.forward import running


class PreRopeKeys:
    """Carries the keys of one attention call from the hook to the attention function: in the forward that is running,
    not in the module, which several threads may share."""

    __slots__ = ("output", "source")

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.output: torch.Tensor | None = None

    def like(self, key: torch.Tensor) -> torch.Tensor:
        """The caught keys in the shape of ``key`` (batch, num_kv_heads, q_len, head_dim)."""
        if self.output is None:
            raise RuntimeError(
                "pre-RoPE keys were not seen: the model's key projection has been replaced since patch(), as adapters "
                "do; unpatch the model and patch it again"
            )
        batch, heads, q_len, head_dim = key.shape
        return self.output.reshape(batch, q_len, heads, head_dim).transpose(1, 2)


def key_source(attention: nn.Module) -> nn.Module:
    """The submodule whose output is the pre-RoPE key."""
    return cast(nn.Module, attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj)


def capture(attention: nn.Module) -> PreRopeKeys:
    """Ask for the keys of the call that is about to run."""
    keys = PreRopeKeys(key_source(attention))
    forward = running.get()
    if forward is not None:
        forward.pre_rope = keys
    return keys


def on_key(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """Forward hook of the key source."""
    forward = running.get()
    if forward is not None and forward.pre_rope is not None and forward.pre_rope.source is module:
        forward.pre_rope.output = output


def release(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the attention module, also after an error: hold no keys beyond the call."""
    forward = running.get()
    if forward is not None:
        forward.pre_rope = None
