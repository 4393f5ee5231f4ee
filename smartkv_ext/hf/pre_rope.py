"""Keys before their rotation, caught where the model makes them: at k_norm (Qwen3), else at k_proj. Exact bits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

_SLOT = "_smartkv_pre_rope"


class PreRopeKeys:
    """Carries the keys of one attention call from the hook to the attention function."""

    __slots__ = ("output",)

    def __init__(self) -> None:
        self.output: torch.Tensor | None = None

    def like(self, key: torch.Tensor) -> torch.Tensor:
        """The caught keys in the shape of ``key`` (batch, num_kv_heads, q_len, head_dim)."""
        if self.output is None:
            raise RuntimeError("pre-RoPE keys were not seen: the patched model's k_proj did not run through its hook")
        batch, heads, q_len, head_dim = key.shape
        return self.output.reshape(batch, q_len, heads, head_dim).transpose(1, 2)


def key_source(attention: nn.Module) -> nn.Module:
    """The submodule whose output is the pre-RoPE key."""
    return cast(nn.Module, attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj)


def capture(attention: nn.Module) -> PreRopeKeys:
    """Ask for the keys of the call that is about to run."""
    keys = PreRopeKeys()
    key_source(attention).__dict__[_SLOT] = keys
    return keys


def on_key(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """Forward hook of the key source."""
    keys = module.__dict__.get(_SLOT)
    if keys is not None:
        keys.output = output


def release(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the attention module, also after an error: hold no keys beyond the call."""
    key_source(module).__dict__.pop(_SLOT, None)
