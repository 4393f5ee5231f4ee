"""patch(model): everything that touches a transformers model, and its undoing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, cast

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from smartkv_ext.cache.forward import Forward, running

from .attention import NAME, not_brought, smartkv_attention
from .compat import UPDATE_GETS_KWARGS, find_cache
from .gate_check import sketch_of
from .mask import smartkv_mask
from .pre_rope import capture, key_source, on_key, release

AttentionInterface.register(NAME, smartkv_attention)
AttentionMaskInterface.register(NAME, smartkv_mask)

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


# Hooks are module-level functions that find things when called: a closure over the module would survive
# copy.deepcopy(model) pointing at the original.
def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    running.set(None)  # an interrupted forward may have left its own
    cache = find_cache(args, kwargs)
    # With another attention than ours there is no forward: update() refuses.
    if cache is None or cast(Any, module.config)._attn_implementation != NAME:
        return
    cache.check_even()
    cache.check_keys(lambda: sketch_of(module))
    cache.open_forward = cache.layers[0].seen
    running.set(Forward(module, cache, cache.open_forward))


def _after_success(module: nn.Module, args: Any, output: Any) -> None:
    """Nothing that was given to the cache may be missing from it."""
    forward = running.get()
    if forward is None or forward.cache is None:
        return
    if forward.waiting or not forward.arrived:
        raise RuntimeError(not_brought(module))
    if len({layer.seen for layer in forward.cache.layers}) > 1:
        raise RuntimeError(
            f"{type(module).__name__} has run fewer layers than the {len(forward.cache.layers)} that the cache has: "
            "model.config.num_hidden_layers must be the number of its layers"
        )
    forward.finished, forward.cache.open_forward = True, None


def _after_model(module: nn.Module, args: Any, output: Any) -> None:
    """Also after an error, which may have come between two layers."""
    forward = running.get()
    running.set(None)
    if forward is None or forward.finished or forward.cache is None:
        return
    with contextlib.suppress(RuntimeError):  # it could not be restored: torch would hide it, the next forward says so
        forward.cache.rollback(forward.start)
        forward.cache.open_forward = None


def _before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    forward = running.get()
    cache = None if forward is None else forward.cache
    if cache is None:
        return None
    policy = cache.smartkv_config.policy
    if policy.needs_pre_rope_keys or policy.scores_keys:
        kwargs["smartkv_pre_rope"] = capture(module)
    if not UPDATE_GETS_KWARGS and find_cache(args, kwargs) is not None:
        kwargs["smartkv_cache"] = cache
    return args, kwargs


_HOOKS = (_before_model, _after_success, _after_model, _before_attention, on_key, release)
# Where torch keeps hooks by id, and what it notes of them.
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks")
_HOOK_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_PREVIOUS = "_smartkv_previous_attention"
_LOCK = threading.RLock()  # two threads may want the same model patched


def attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Self-attention modules of the decoder layers."""
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "k_proj") and type(module).__name__.endswith("Attention"):
            yield module


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The innermost transformers model that holds all attention modules: every wrapper's calls go through it."""
    wanted = set(attention_modules(model))
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= set(m.modules())]
    if not wanted or not found:
        raise TypeError(f"model must be a transformers model with attention; got {type(model).__name__}")
    return found[-1]


def is_patched(model: nn.Module) -> bool:
    """Whether ``patch`` is in force: a fact of the model's hooks, which copies have and other models of its config do
    not."""
    return any(_is_hooked(m) and cast(Any, m.config)._attn_implementation == NAME for m in model.modules())


def _is_hooked(module: nn.Module) -> bool:
    return any(hook is _before_model for hook in module._forward_pre_hooks.values())


class PatchHandle:
    """Undoes ``patch``: call ``remove()``, or use it as a context manager."""

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._name, self._layers = type(model).__name__, len(list(attention_modules(model)))

    def remove(self) -> None:
        """Restore the model's own attention. A second call does nothing."""
        if self._model is not None:
            unpatch(self._model)
            self._model = None

    def __repr__(self) -> str:
        state = f"{self._layers} layers" if self._model is not None else "removed"
        return f"PatchHandle({self._name}, {state})"

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def patch(model: nn.Module) -> PatchHandle:
    """Let ``model`` (Qwen2, Qwen2.5, Qwen3, Llama, Mistral of transformers, or a wrapper of one) run with a
    SmartKVCache.

    The model's files and forward methods stay as they are: an attention and a mask function are registered and
    chosen for the decoder, and hooks tell it which cache a forward was given. With any other cache, or none, the model
    computes plain sdpa attention.

    Raises:
        TypeError: not a transformers model.
        ValueError: unsupported model type, or already patched.
        RuntimeError: the model class does not let its attention be chosen.
    """
    with _LOCK:
        return _patch(model, decoder_of(model))


def ensure_patched(model: nn.Module) -> None:
    """``patch`` a model that is not patched."""
    with _LOCK:
        if not is_patched(model):
            patch(model)


def _patch(model: nn.Module, decoder: PreTrainedModel) -> PatchHandle:
    model_type = decoder.config.get_text_config(decoder=True).model_type
    if model_type not in SUPPORTED:
        raise ValueError(f"model type must be one of {', '.join(SUPPORTED)}; got {model_type!r}")
    if is_patched(model):
        raise ValueError(
            "model is already patched: remove() the first patch, or unpatch(model), before you patch again"
        )
    if _is_hooked(decoder):  # another attention was chosen since: by hand, or for another model of the same config
        decoder.set_attn_implementation(NAME)
        return PatchHandle(model)
    previous = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    if decoder.config._attn_implementation != NAME:  # transformers only logs a warning when a class cannot switch
        raise RuntimeError(f"{type(decoder).__name__} does not let its attention implementation be chosen")
    # On the module, so that a copy of the model knows it too. A model of the same config, or one that was loaded with
    # attn_implementation="smartkv", has our function already and computes sdpa with it.
    decoder.__dict__[_PREVIOUS] = "sdpa" if previous == NAME else previous
    decoder.register_forward_pre_hook(_before_model, with_kwargs=True)
    decoder.register_forward_hook(_after_success)
    decoder.register_forward_hook(_after_model, always_call=True)
    for module in attention_modules(decoder):
        module.register_forward_pre_hook(_before_attention, with_kwargs=True)
        key_source(module).register_forward_hook(on_key)
        module.register_forward_hook(release, always_call=True)
    return PatchHandle(model)


def unpatch(model: nn.Module) -> None:
    """Undo ``patch``, also on a copy of a patched model, or where ``SmartKVCache(model)`` has patched it. Does nothing
    to a model that is not patched."""
    for module in model.modules():
        for name in _HOOK_TABLES:
            table = getattr(module, name)
            for key in [key for key, hook in table.items() if hook in _HOOKS]:
                for other in (*_HOOK_TABLES, *_HOOK_FLAGS):
                    getattr(module, other).pop(key, None)
        if _PREVIOUS in module.__dict__:
            cast(Any, module).set_attn_implementation(module.__dict__.pop(_PREVIOUS))
