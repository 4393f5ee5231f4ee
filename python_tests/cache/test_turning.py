"""Means that turn with RoPE, and weights of channels: what they are worth, and that they stay with their cache."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hf.tiny import generate, prompts, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.cache import turning
from smartkv_ext.cache.turning import fixed_frequencies
from smartkv_ext.reference.turns import MAX_TURNS


def biased_model(norm, pairs=(2, 7, 11, 18)):
    """Keys have a large mean before RoPE in a few pairs of channels that turn within a hundred tokens."""
    model = tiny("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    generator = torch.Generator().manual_seed(0)
    channels = torch.tensor([*pairs, *(p + 32 for p in pairs)])
    with torch.no_grad():
        for layer in model.model.layers:
            bias = torch.zeros(2, 64)
            bias[:, channels] = torch.randn(2, len(channels), generator=generator)
            layer.self_attn.k_proj.bias.copy_((bias / bias.norm(dim=1, keepdim=True) * norm).flatten())
    return model


def new_cache(model, *, turns=True, **arguments):
    cache = SmartKVCache(model.config, **{"budget": None, "policy": "full", "window": 32, "tiers": (4,)} | arguments)
    if not turns:
        cache.configure(replace(cache.smartkv_config, turn_freq=()))
    return cache


def divergence(model, **arguments):
    """KL(full || compressed) in nats, mean over 40 teacher-forced tokens after a prefill of 260."""
    ids, _ = prompts(1, 300)
    with torch.no_grad(), smartkv_ext.patch(model):
        full = model(ids).logits[0, 260:].log_softmax(-1)
        cache = new_cache(model, **arguments)
        model(ids[:, :260], past_key_values=cache)
        ours = model(ids[:, 260:], past_key_values=cache).logits[0].log_softmax(-1)
    return (full.exp() * (full - ours)).sum(-1).mean().item()


def packed(model, ids, mask=None, **arguments):
    with torch.no_grad(), smartkv_ext.patch(model):
        cache = new_cache(model, **arguments)
        model(ids, past_key_values=cache, attention_mask=mask)
    return cache


def test_a_mean_that_turns_saves_keys():
    model = biased_model(60)
    turned, constant = divergence(model), divergence(model, turns=False)
    assert constant > 3 * turned, (turned, constant)


def test_the_mean_is_found():
    """Turns are those of the biased pairs, whatever the padding, and what they leave is small."""
    model = biased_model(200)
    ids, _ = prompts(1, 260)
    padded = torch.cat([torch.zeros(1, 37, dtype=ids.dtype), ids], 1)
    mask = torch.cat([torch.zeros(1, 37), torch.ones(1, 260)], 1).long()
    angles = torch.tensor([2, 7, 11, 18]).double()
    want = sorted((1e6 ** (-angles / 32) * 2**32 / (2 * math.pi)).round().long().tolist())
    for cache in (packed(model, ids), packed(model, padded, mask)):
        for layer in cache.layers:
            store = layer.store
            for h in range(2):
                steps = (store.turn_steps[0, h].long() % 2**32).tolist()
                assert sorted(s for s in steps if s) == want
            k, _, positions = store.dequantize()
            assert float(store.k_mean.norm(dim=-1).max()) < 30
            assert bool((k[positions >= 0].norm(dim=-1) > 100).all())


def test_nothing_turns_where_it_earns_little(monkeypatch):
    monkeypatch.setattr(turning, "LEAST_GAIN", 1e6)
    cache = packed(tiny("llama"), prompts(1, 260)[0])
    assert all(layer.store.k_turns is None for layer in cache.layers)
    assert all(layer.store.k_weights is not None for layer in cache.layers)


def test_a_head_has_at_most_the_turns_that_ops_take():
    cache = packed(biased_model(800, range(1, 24, 2)), prompts(1, 260)[0])
    assert {layer.store.k_turns.shape[2] for layer in cache.layers} == {MAX_TURNS}


def test_weights_put_noise_where_queries_are_small(monkeypatch):
    model = tiny("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:  # strong queries in one half of the pairs, strong keys in the other
            strong = (torch.arange(64) % 32 < 16).float()
            for projection, scale in ((layer.self_attn.q_proj, strong), (layer.self_attn.k_proj, 1 - strong)):
                heads = projection.weight.shape[0] // 64
                factor = (scale * 5.8 + 0.2).repeat(heads)
                projection.weight.mul_(factor[:, None])
                projection.bias.mul_(factor)
    weighted = divergence(model, tiers=(3,))
    monkeypatch.setattr("smartkv_ext.cache.layer.measure_queries", lambda layer, q: None)
    assert divergence(model, tiers=(3,)) > 2 * weighted


@pytest.mark.parametrize("mean_shift", [True, False])
def test_only_with_a_mean_shift(mean_shift):
    cache = packed(biased_model(200), prompts(1, 260)[0], mean_shift=mean_shift)
    assert all((layer.store.k_turns is not None) == mean_shift for layer in cache.layers)
    assert all((layer.store.k_weights is not None) == mean_shift for layer in cache.layers)
    assert all(layer.store.query_power is None or not mean_shift for layer in cache.layers)


def test_bytes_are_counted():
    cache = packed(biased_model(200), prompts(1, 260)[0])
    per_head = 64 * 4 + 4 * (2 * 64 * 2 + 4) + 64 * 4  # mean; U, V and step of four turns; weights
    assert cache.report().parts["means"] == 4 * 2 * per_head


def test_they_stay_with_their_cache(tmp_path):
    """Saved, copied, reordered and cropped caches go on as the one that they come from."""
    model, path = biased_model(200), tmp_path / "cache.safetensors"
    ids, mask = prompts(2, 260)
    with torch.no_grad(), smartkv_ext.patch(model):
        cache = new_cache(model)
        model(ids, past_key_values=cache, attention_mask=mask)
        cache.save(path)
        loaded, copied = SmartKVCache.load(path, model.config), copy.deepcopy(cache)
        assert loaded.report() == cache.report() and loaded.smartkv_config == cache.smartkv_config
        swapped = copy.deepcopy(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        more = torch.cat([mask, mask[:, :1] * 0 + 1], 1)
        want = model(ids[:, :1], past_key_values=cache, attention_mask=more).logits
        for other in (loaded, copied):
            assert torch.equal(model(ids[:, :1], past_key_values=other, attention_mask=more).logits, want)
        got = model(ids[:, :1].flip(0), past_key_values=swapped, attention_mask=more.flip(0)).logits
        assert torch.allclose(got.flip(0), want, atol=1e-4)


def test_files_of_before_are_read(tmp_path):
    model, path = biased_model(200), tmp_path / "cache.safetensors"
    ids, mask = prompts(1)
    with smartkv_ext.patch(model):
        cache = new_cache(model, turns=False)
        generate(model, ids, mask, cache)
        cache.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["smartkv_cache"])
    del header["min_tokens"]  # files of format 3 lack what came later
    for layer in header["layers"]:
        del layer["query_keep"]
    save_file(load_file(path), path, {"smartkv_cache": json.dumps(header | {"format_version": 3})})
    loaded = SmartKVCache.load(path, model.config)
    assert loaded.report() == cache.report()


def test_prompts_of_one_token_have_no_weights():
    model = tiny("qwen2")
    with torch.no_grad(), smartkv_ext.patch(model):
        cache = new_cache(model)
        for _ in range(80):
            model(torch.tensor([[5]]), past_key_values=cache)
    assert not cache.layers[0].store.is_empty and cache.layers[0].store.k_weights is None


@pytest.mark.parametrize(
    ("parameters", "length", "holds"),
    [
        ({"rope_type": "default"}, 32, True),
        ({"rope_type": "llama3"}, 32, True),
        ({"rope_type": "dynamic"}, 32, False),
        ({"rope_type": "longrope"}, 32, False),
        ({"rope_type": "default"}, 16, False),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, 32, False),
        ({}, 0, False),
    ],
)
def test_frequencies_must_be_fixed(parameters, length, holds):
    config = SimpleNamespace(rope_parameters=parameters)
    config.get_text_config = lambda decoder: config
    frequencies = tuple(float(i) for i in range(length))
    assert fixed_frequencies(config, frequencies, 64) == (frequencies if holds else ())


def test_what_a_constant_leaves():
    """All of a pair that turns many times, nothing of one that hardly turns."""
    left = turning._left(torch.tensor([1.0, 1e-6], dtype=torch.float64), 4000)
    assert float(left[0]) > 0.999 and float(left[1]) < 1e-4
    assert float(turning._left(torch.tensor([0.5]).double(), 1)[0]) == pytest.approx(0, abs=1e-6)
