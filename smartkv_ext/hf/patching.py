"""patch(model): everything that touches a transformers model, and its undoing."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from smartkv_ext.cache import SmartKVCache

from .attention import NAME, smartkv_attention
from .gate_check import sketch_of
from .mask import smartkv_forward, smartkv_mask
from .pre_rope import capture, key_source, on_key, release

AttentionInterface.register(NAME, smartkv_attention)
AttentionMaskInterface.register(NAME, smartkv_mask)

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


# Hooks are module-level functions that find things when called: a closure over the module would survive
# copy.deepcopy(model) pointing at the original.
def _before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, SmartKVCache) or cast(Any, module.config)._attn_implementation != NAME:
        return None  # update() then refuses: another attention function would not see what the cache holds
    cache.layers[cast(int, module.layer_idx)].hand_over()
    policy = cache.smartkv_config.policy
    if policy.needs_pre_rope_keys or policy.scores_keys:
        kwargs["smartkv_pre_rope"] = capture(module)
    return args, {**kwargs, "smartkv_cache": cache}


def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    smartkv_forward.set(isinstance(cache, SmartKVCache))
    if isinstance(cache, SmartKVCache):
        cache.check_keys(lambda: sketch_of(module))


def _after_model(module: nn.Module, args: Any, output: Any) -> None:
    smartkv_forward.set(False)


def attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Self-attention modules of the decoder layers."""
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "k_proj") and type(module).__name__.endswith("Attention"):
            yield module


class PatchHandle:
    """Undoes ``patch``: call ``remove()``, or use it as a context manager."""

    def __init__(self, model: PreTrainedModel, previous: str, hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
        self._model, self._previous, self._hooks = model, previous, hooks

    def remove(self) -> None:
        """Restore the model's own attention. A second call does nothing."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._model.set_attn_implementation(self._previous)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def patch(model: PreTrainedModel) -> PatchHandle:
    """Let ``model`` (Qwen2, Qwen2.5, Qwen3, Llama, Mistral of transformers) run with a SmartKVCache.

    The model's files and forward methods stay as they are: an attention and a mask function are registered and
    chosen, and a forward pre-hook hands the cache to them. With any other cache, or none, the model computes plain
    sdpa attention.

    Raises:
        TypeError: not a transformers model.
        ValueError: unsupported model type, or already patched.
        RuntimeError: the model class does not let its attention be chosen.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    model_type = config.get_text_config(decoder=True).model_type
    if model_type not in SUPPORTED:
        raise ValueError(f"model type must be one of {', '.join(SUPPORTED)}; got {model_type!r}")
    if config._attn_implementation == NAME:
        raise ValueError("model is already patched: remove() the first patch before you patch again")
    previous = config._attn_implementation
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:  # transformers only logs a warning when a class cannot switch
        raise RuntimeError(f"{type(model).__name__} does not let its attention implementation be chosen")
    hooks = [
        model.base_model.register_forward_pre_hook(_before_model, with_kwargs=True),
        model.base_model.register_forward_hook(_after_model, always_call=True),
    ]
    for module in attention_modules(model):
        hooks.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
        hooks.append(key_source(module).register_forward_hook(on_key))
        hooks.append(module.register_forward_hook(release, always_call=True))
    return PatchHandle(model, previous, hooks)
