"""Watch the attention of a real model while it runs: queries, keys and values of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smartkv_ext.hf.patching import attention_modules
from smartkv_ext.hf.pre_rope import key_source

NAME = "smartkv_recording"


@dataclass
class LayerCall:
    """One attention call: q (batch, num_heads, n, head_dim); k, v (batch, num_kv_heads, n, head_dim); q, k rotated."""

    module: torch.nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    pre_rope: torch.Tensor  # (batch, num_kv_heads, n, head_dim) keys before their rotation
    hidden: torch.Tensor  # (batch, n, hidden_size) input of the attention module
    residual: torch.Tensor  # (batch, n, hidden_size) input of the decoder layer

    @property
    def layer_idx(self) -> int:
        return int(self.module.layer_idx)  # type: ignore[arg-type]


_listener: Callable[[LayerCall], None] | None = None
_caught: dict[str, torch.Tensor] = {}


def _recorded(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    batch, heads, n, head_dim = key.shape
    pre_rope = _caught["pre_rope"].reshape(batch, n, heads, head_dim).transpose(1, 2)
    scale = kwargs.get("scaling") or head_dim**-0.5
    assert _listener is not None, "the attention function is chosen inside recording() alone"
    _listener(LayerCall(module, query, key, value, scale, pre_rope, _caught["hidden"], _caught["residual"]))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, _recorded)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return x


def _catch_residual(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _caught["residual"] = _input(args, kwargs)


def _catch_hidden(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _caught["hidden"] = _input(args, kwargs)


def _catch_key(module: Any, args: Any, output: torch.Tensor) -> None:
    _caught["pre_rope"] = output


@contextmanager
def recording(model: Any, listener: Callable[[LayerCall], None]) -> Iterator[None]:
    """Inside, every layer of every forward calls ``listener`` before its attention is computed, with sdpa."""
    global _listener
    previous, outer = model.config._attn_implementation, _listener
    model.set_attn_implementation(NAME)
    _listener = listener
    hooks = [layer.register_forward_pre_hook(_catch_residual, with_kwargs=True) for layer in model.base_model.layers]
    for module in attention_modules(model):
        hooks.append(module.register_forward_pre_hook(_catch_hidden, with_kwargs=True))
        hooks.append(key_source(module).register_forward_hook(_catch_key))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _caught.clear()
        _listener = outer
        model.set_attn_implementation(previous)
