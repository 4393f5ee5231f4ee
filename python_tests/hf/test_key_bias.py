"""Qwen2.5 has key biases of hundreds; plain per-token quantisation of its keys destroys the model. The mean shift
must stay."""

import pytest
import torch
from hf.tiny import prompts, tiny

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.reference.layout import TIERS


def biased_model(norm):
    model = tiny("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})  # as Qwen2.5
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias
            # Only low-frequency rotary channels (the last of each half) keep their bias through RoPE.
            direction = torch.randn(2, 64, generator=generator)
            direction[:, :24] = direction[:, 32:56] = 0
            bias.copy_((direction / direction.norm(dim=1, keepdim=True) * norm).flatten())
    return model


def divergence(model, **arguments):
    """KL(full || compressed) in nats, mean over 40 teacher-forced tokens after a prefill of 260."""
    ids, _ = prompts(1, 300)
    with torch.no_grad(), smartkv_ext.patch(model):
        full = model(ids).logits[0, 260:].log_softmax(-1)
        cache = SmartKVCache(model.config, budget=None, policy="full", window=32, **arguments, min_tokens=0)
        model(ids[:, :260], **cache_kwargs(cache))
        ours = model(ids[:, 260:], **cache_kwargs(cache)).logits[0].log_softmax(-1)
    return (full.exp() * (full - ours)).sum(-1).mean().item()


@pytest.mark.parametrize(("norm", "factor"), [(22, 2), (600, 20)])
def test_mean_shift_saves_biased_keys(norm, factor):
    model = biased_model(norm)
    shifted = divergence(model, tiers=(4,))
    plain = divergence(model, tiers=(4,), levels="uniform", mean_shift=False)
    unbiased = divergence(tiny("qwen2"), tiers=(4,))
    assert shifted < 2 * unbiased, (shifted, unbiased)
    assert plain > factor * shifted, (plain, shifted)


def test_more_bits_are_better():
    model = biased_model(100)
    divergences = [divergence(model, tiers=(bits,)) for bits in TIERS]
    assert divergences == sorted(divergences, reverse=True), divergences
    assert divergences[-1] < 1e-6
