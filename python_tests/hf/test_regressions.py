"""Each of these was wrong once."""

import pytest
import torch
from hf.tiny import generate, prompts, tiny

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs


def test_records_beyond_the_sliding_window_are_freed():
    model = tiny("mistral_sliding")  # slides over 50 tokens
    ids, _ = prompts(1, 1200)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget="200kB", policy="knorm", tiers=(4,), window=16, min_tokens=0)
        for start in range(0, 1200, 100):
            model(ids[:, start : start + 100], **cache_kwargs(cache))
            assert cache.report().total_bytes <= 200_000
        for layer in cache.layers:
            held = layer.store.positions()
            assert (held[held >= 0] > 1200 - 50 - 100).all()


def test_full_policy_spends_a_large_budget_without_losing_a_token():
    """New tokens may take high tiers, old records may not: pages that nobody else can fill must not be bought."""
    model = tiny("qwen2")
    ids, _ = prompts(1, 1100)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=0.5, policy="full", window=16, min_tokens=0)
        model(ids[:, :1000], **cache_kwargs(cache))
        for step in range(1000, 1100):
            model(ids[:, step : step + 1], **cache_kwargs(cache))
    assert cache.report().tokens_per_tier["evicted"] == 0


def test_compression_goes_on_after_assisted_decoding():
    model = tiny("qwen2")
    ids, mask = prompts(1, 300)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, budget=0.4, policy="keydiff", window=16, min_tokens=0)
        out = model.generate(
            ids,
            attention_mask=mask,
            **cache_kwargs(cache),
            max_new_tokens=20,
            do_sample=False,
            prompt_lookup_num_tokens=4,
        )
        longer = torch.cat([out, ids], 1)
        model.generate(longer, attention_mask=torch.ones_like(longer), **cache_kwargs(cache), max_new_tokens=60)
    report = cache.report()
    assert report.total_bytes <= 0.4 * report.full_bytes, str(report)


def test_patched_model_without_our_cache_is_plain_sdpa():
    model = tiny("qwen2")
    ids, mask = prompts(2, 40)
    packed = torch.cat([torch.arange(20), torch.arange(20)])[None]
    plain = model(ids[:1], position_ids=packed, use_cache=False).logits
    static = generate(model, ids, mask, cache_implementation="static", new=8)
    with smartkv_ext.patch(model):
        assert torch.equal(model(ids[:1], position_ids=packed, use_cache=False).logits, plain)
        assert torch.equal(generate(model, ids, mask, cache_implementation="static", new=8).sequences, static.sequences)


def test_another_attention_implementation_is_refused():
    model = tiny("qwen2")
    ids, _ = prompts(1, 60)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, min_tokens=0)
        model(ids, **cache_kwargs(cache))
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="needs a patched model"):
            model(ids[:, :1], **cache_kwargs(cache))
        model.set_attn_implementation("smartkv")


def test_prefill_in_inference_mode_then_generate():
    model = tiny("qwen2")
    ids, mask = prompts(1, 200)
    arguments = dict(budget=0.5, policy="keydiff", window=24)
    with smartkv_ext.patch(model):
        a, b = (
            SmartKVCache(model.config, **arguments, min_tokens=0),
            SmartKVCache(model.config, **arguments, min_tokens=0),
        )
        with torch.inference_mode():
            model(ids[:, :150], **cache_kwargs(a))
        with torch.no_grad():
            model(ids[:, :150], **cache_kwargs(b))
        assert torch.equal(*(generate(model, ids, mask, c, new=40).sequences for c in (a, b)))


def test_crop_keeps_counts_buffers_and_anchors_true():
    model = tiny("qwen2")
    ids, mask = prompts(2, 150)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=0.5, policy="keydiff", window=16, min_tokens=0)
        model(ids, attention_mask=mask, **cache_kwargs(cache))
        cache.crop(-110)
        layer = cache.layers[0]
        assert (layer.row_tokens >= 0).all()
        assert layer.window.shape[2] <= max(layer.capacity, layer.window.used)
        anchor = layer.state["keydiff_anchor"].clone()
        model(ids[:, :100], **cache_kwargs(cache))
        assert not torch.equal(anchor, layer.state["keydiff_anchor"]), "tokens after a crop must count"
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0 and cache.report().total_bytes == 0
        model(ids[:1], **cache_kwargs(cache))  # another batch size is fine now


def test_cropping_into_a_forgotten_sliding_window_is_refused():
    model = tiny("mistral_sliding")
    ids, _ = prompts(1, 200)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=None, policy="full", tiers=(16,), window=16, min_tokens=0)
        model(ids, **cache_kwargs(cache))
        with pytest.raises(ValueError, match="slides over 50 tokens and has forgotten"):
            cache.crop(-70)


def test_a_refused_crop_changes_no_layer():
    model = tiny("qwen3_hybrid")  # two full layers, then two that slide over 40 tokens
    ids, _ = prompts(1, 200)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=None, policy="full", tiers=(16,), window=16, min_tokens=0)
        model(ids, **cache_kwargs(cache))
        with pytest.raises(ValueError, match="has forgotten"):
            cache.crop(-70)
        assert {layer.seen for layer in cache.layers} == {200}
        with pytest.raises(RuntimeError, match="it is empty now"):
            cache.rollback(130)
        assert cache.get_seq_length() == 0


def test_repeating_rows_keeps_a_byte_budget():
    model = tiny("qwen2")
    ids, _ = prompts(1, 800)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget="600kB", policy="knorm", window=16, min_tokens=0)
        model(ids, **cache_kwargs(cache))
        cache.batch_repeat_interleave(4)
        model(ids[:, :1].expand(4, 1), **cache_kwargs(cache))
        assert cache.report().total_bytes <= 600_000
        with pytest.raises(ValueError, match="budget must be at least"):
            cache.batch_repeat_interleave(8)


def test_remembered_queries_stay_within_their_share():
    model = tiny("qwen3", num_attention_heads=16)
    ids, _ = prompts(1, 1200)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=0.25, policy="snapkv", min_tokens=0)
        model(ids[:, :1024], **cache_kwargs(cache))
        for start in range(1024, 1200, 2):
            model(ids[:, start : start + 2], **cache_kwargs(cache))
            report = cache.report()
            assert report.total_bytes <= 0.25 * report.full_bytes, str(report)
