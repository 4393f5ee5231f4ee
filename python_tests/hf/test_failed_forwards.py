"""Forwards that fail, are interrupted, or run beside others: a cache holds what it was given, or says otherwise."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hf.tiny import assert_same, generate, prompts, tiny

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import Policy


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_an_error_between_layers_leaves_the_cache_as_it_was(part, error):
    model = tiny("qwen2")
    ids, mask = prompts(1)
    reference = generate(model, ids, mask)
    cache = SmartKVCache(model, budget=None, tiers=(16,), window=16)

    def fail(*args):
        raise error

    hook = getattr(model.model.layers[2], part).register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        generate(model, ids, mask, cache)
    hook.remove()
    if isinstance(error, KeyboardInterrupt):  # torch runs no hooks behind one
        with pytest.raises(RuntimeError, match="interrupted; the cache is back at 0 tokens"):
            generate(model, ids, mask, cache)
    assert_same(reference, generate(model, ids, mask, cache))


@pytest.mark.parametrize("layers", [1, 4])
def test_an_interrupt_behind_the_last_attention_is_noticed(layers):
    model = tiny("qwen2", num_hidden_layers=layers)
    ids, _ = prompts(1, 60)
    cache = SmartKVCache(model, budget=None)

    def interrupt(*args):
        raise KeyboardInterrupt

    other = type(model)(model.config).eval()  # has our function and no hooks: computes sdpa
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :50], **cache_kwargs(cache))
        hook = model.model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 50:], **cache_kwargs(cache))
        hook.remove()
        with pytest.raises(RuntimeError, match="interrupted, and its mask came to another model: call again"):
            other(ids[:, :9])
        assert (other(ids[:, :9]).logits - other(ids[:, :12]).logits[:, :9]).abs().max() < 1e-4
        with pytest.raises(RuntimeError, match="interrupted; the cache is back at 50 tokens"):
            model(ids[:, 50:], **cache_kwargs(cache))
        assert (model(ids[:, 50:], **cache_kwargs(cache)).logits - whole[:, 50:]).abs().max() < 1e-4
    assert cache.get_seq_length() == 60


def test_a_sliding_layer_that_has_forgotten_too_much_is_said_to_be_lost():
    model = tiny("mistral_sliding")
    ids, _ = prompts(1, 320)
    cache = SmartKVCache(model, budget=0.9, policy="keydiff", window=64, min_tokens=0)

    def fail(*args):
        raise RuntimeError("out of memory")

    with torch.no_grad():
        model(ids[:, :200], **cache_kwargs(cache))
        hook = model.model.layers[3].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids[:, 200:], **cache_kwargs(cache))
        hook.remove()
        with pytest.raises(RuntimeError, match="could not be restored: it is empty now"):
            model(ids[:, 200:], **cache_kwargs(cache))
        model(ids, **cache_kwargs(cache))  # from the start again
    assert cache.get_seq_length() == 320


@dataclass(frozen=True)
class OwnKeys(Policy):
    """Asks for the keys before RoPE."""

    name: ClassVar[str] = "own_keys"
    needs_pre_rope_keys: ClassVar[bool] = True

    def score(self, view):
        return view.positions[:, None].float().expand(view.keys.shape[:3])


def test_threads_share_a_model():
    """Each thread's keys before RoPE come to its own cache, however the layers of the two forwards interleave."""
    model = tiny("qwen2")
    ids = [prompts(1, 100, seed=seed)[0] for seed in (3, 4)]
    smartkv_ext.patch(model)
    turns = threading.Barrier(2, timeout=30)

    def wait(*args):
        turns.wait()

    def run(mine, cache):
        with torch.no_grad():
            model(mine, **cache_kwargs(cache))

    alone, together = ([SmartKVCache(model.config, None, OwnKeys()) for _ in ids] for _ in range(2))
    for mine, cache in zip(ids, alone, strict=True):
        run(mine, cache)
    for layer in model.model.layers:  # both threads are behind k_proj here, and before their attention
        layer.self_attn.v_proj.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run, mine, cache) for mine, cache in zip(ids, together, strict=True)]:
            done.result()
    for mine, other in zip(together, alone, strict=True):
        for a, b in zip(mine.layers, other.layers, strict=True):
            assert torch.equal(a.window.held("pre_rope"), b.window.held("pre_rope"))
