"""The attention function that transformers calls in every layer of a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smartkv_ext.cache import SmartKVCache
from smartkv_ext.cache.forward import running

from .compat import is_continuous_batching, tried
from .mask import dense_mask
from .pre_rope import PreRopeKeys

NAME = "smartkv"

# Keyword arguments that say nothing about the result of a SmartKVCache's attention. Any other that is set is refused:
# attention sinks, soft caps and the like would otherwise be left out without a word.
WITHOUT_EFFECT = frozenset({
    "position_ids",  # of the rotation, which is done; masks come from logical positions
    "use_cache", "cache_position", "output_hidden_states", "output_router_logits", "num_items_in_batch",
    "logits_to_keep", "return_dict", "labels", "token_type_ids",
})  # fmt: skip


def smartkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    smartkv_cache: SmartKVCache | None = None,
    smartkv_pre_rope: PreRopeKeys | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (batch, num_heads, q_len, head_dim); key, value (batch, num_kv_heads, kv_len, head_dim) -> (batch,
    q_len, num_heads, head_dim), None. Attention weights are never returned, as with sdpa.

    Without a SmartKVCache (training, DynamicCache, no cache) this is sdpa.

    Raises NotImplementedError for what a SmartKVCache cannot do, naming the argument.
    """
    if is_continuous_batching(kwargs):
        raise NotImplementedError("generate_batch (continuous batching) is not supported: unpatch the model first")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if smartkv_cache is None:
        if running.get() is not None:
            raise RuntimeError(not_brought(module))
        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise NotImplementedError(
            "output_attentions must be False with a SmartKVCache: attention weights never exist whole"
        )
    check_kwargs(kwargs)
    if dropout:
        raise NotImplementedError(f"attention dropout must be 0 with a SmartKVCache; got {dropout}: call model.eval()")
    if attention_mask is not None and attention_mask.dim() != 2:  # transformers hands custom masks through untouched
        raise NotImplementedError(
            f"attention_mask must be 2D (batch, length) with a SmartKVCache; got {attention_mask.dim()}D: "
            "custom masks are supported without a SmartKVCache only"
        )
    out = attend_cached(module, query, key, value, attention_mask, scaling, smartkv_cache, smartkv_pre_rope)
    return cast(torch.Tensor, out), None


def not_brought(module: torch.nn.Module) -> str:
    """Why a forward that was given a SmartKVCache is wrong: an attention module, or the decoder, had none."""
    forward = running.get()
    decoder = None if forward is None else forward.decoder
    if decoder is None or all(module is not m for m in decoder.modules()):
        running.set(None)
        return "a forward with a SmartKVCache was interrupted, and its mask came to another model: call again"
    layer = getattr(module, "layer_idx", None)
    what = "no layer brought" if layer is None else f"layer {layer} of {type(decoder).__name__} did not bring"
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        reason = "gradient checkpointing takes the cache away in train mode; call model.eval()"
    else:
        reason = f"its attention was not given the cache, or does not call the function that patch() chose; {tried()}"
    return f"{what} its keys to the SmartKVCache of this forward, whose output would be wrong: {reason}"


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of attention that may change its result and that we do not know, by name.

    Raises NotImplementedError.
    """
    unknown = [name for name, value in kwargs.items() if name not in WITHOUT_EFFECT and not _is_unset(name, value)]
    if unknown:
        raise NotImplementedError(
            f"{', '.join(sorted(unknown))}: this argument of attention is not supported with a SmartKVCache, and "
            f"leaving it out would change the result; {tried()}"
        )


def _is_unset(name: str, value: Any) -> bool:
    return value is None or value is (name == "is_causal")  # the one argument that is False to ask for something


def _prefill(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    scaling: float,
    sliding_window: int,
) -> torch.Tensor:
    """The first tokens of a cache see nothing but each other: stock sdpa."""
    mask = dense_mask(valid, query.shape[2], key.shape[2], sliding_window, query.device)
    out: torch.Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, mask, scaling=scaling, is_causal=mask is None
    )[0]
    return out


@torch.inference_mode(False)  # what the cache keeps must outlive an inference-mode prefill
@torch.no_grad()
@torch.compiler.disable  # type: ignore[untyped-decorator]  # packing depends on lengths that change every step: traced, each would be a new graph
def attend_cached(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    scaling: float,
    cache: SmartKVCache,
    pre_rope: PreRopeKeys | None,
) -> torch.Tensor:
    """Append to the cache, attend, pack what is due; (batch, q_len, num_heads, head_dim)."""
    forward = running.get()
    if forward is not None:
        forward.waiting, forward.arrived = False, True
    layer_idx = cast(int, module.layer_idx)
    layer = cache.layers[layer_idx]
    q_len, start = query.shape[2], layer.seen
    query, key = query.to(value.dtype), key.to(value.dtype)  # as autocast does for sdpa
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        query, key, value = query.detach(), key.detach(), value.detach()
    valid = None if padding is None else padding[:, -q_len:]
    if key.shape[1] != cache.smartkv_config.geometry.num_kv_heads:
        layer.head_offset = _first_local_head(module, key.shape[1])
    try:
        layer.append(key, value, None if pre_rope is None else pre_rope.like(key).to(key.dtype), valid)
        layer.remember_queries(query)
        if start == 0 and q_len > 1:
            out = _prefill(module, query, key, value, valid, scaling, layer.sliding_window)
            layer.measure_prefill(query, scaling)
        else:
            out = layer.attend_new(query, scaling).transpose(1, 2)
        cache.after_attention(layer_idx, scaling)
    except BaseException:  # an interrupt too: layers of different lengths would be silently wrong
        cache.rollback(start)  # a failed step leaves the cache as it was
        raise
    return out.contiguous()


def _first_local_head(module: torch.nn.Module, local_heads: int) -> int:
    """Index of this rank's first KV head under tensor parallelism: policies that know heads by number need it."""
    mesh = getattr(cast(torch.nn.Linear, module.k_proj).weight, "device_mesh", None)
    return 0 if mesh is None else mesh.get_local_rank() * local_heads
