"""A replayed prefill is the prefill."""

import pytest
import torch

from python_tests.hf.tiny import prompts, tiny
from smartkv_ext import SmartKVCache, patch
from smartkv_ext.eval.methods import get_method, held
from smartkv_ext.eval.recording import Recording, record, replay
from smartkv_ext.hf import cache_kwargs

POLICIES = ["keydiff", "snapkv", "h2o", "expected_attention", "hybrid"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_replay_equals_prefill(kind, policy):
    model = tiny(kind)
    ids, _ = prompts(1, 400)
    with torch.no_grad(), patch(model):
        recording = record(model, ids[:, :380])
        caches = [SmartKVCache(model.config, budget=0.25, policy=policy, window=32, min_tokens=0) for _ in range(2)]
        model(ids[:, :380], **cache_kwargs(caches[0]))
        replay(recording, caches[1])
        logits = [model(ids[:, 380:], **cache_kwargs(cache)).logits for cache in caches]
    assert torch.equal(logits[0], logits[1])
    assert caches[0].report() == caches[1].report()


def test_saved_recording(tmp_path):
    model = tiny("qwen2").to(torch.bfloat16)
    with torch.no_grad(), patch(model):
        recording = record(model, prompts(1, 100)[0])
    recording.save(tmp_path / "new" / "r.safetensors")
    again = Recording.load(tmp_path / "new" / "r.safetensors")
    assert torch.equal(again.ids, recording.ids) and len(again.layers) == 4
    assert again.softmax_scale == pytest.approx(recording.softmax_scale)
    for a, b in zip(again.layers, recording.layers, strict=True):
        for name in ("q", "k", "v", "pre_rope"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_replay_into_other_caches():
    model = tiny("llama")
    ids, _ = prompts(1, 150)
    with torch.no_grad():
        whole = model(ids).logits[:, 140:]
        with patch(model):
            recording = record(model, ids[:, :140])
            cache = get_method("full").prefill(model, recording)
            logits = model(ids[:, 140:], **cache_kwargs(cache)).logits
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    expected = model(ids[:, :140]).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(recording.next_token, expected, atol=1e-4, rtol=1e-4)


def test_held_bytes_of_simulated_cache():
    """KIVI at 2 bits in groups of 32: 3 bits per value, 128 + 150 % 32 tokens exact."""
    model = tiny("qwen2")
    ids, _ = prompts(1, 300)
    with torch.no_grad(), patch(model):
        recording = record(model, ids)
        cache = get_method("kivi bits=2").prefill(model, recording)
    old = (300 - 128) // 32 * 32
    values = 4 * 2 * 64 * 2  # layers, heads, channels, keys and values
    assert held(cache, recording, 300).num_bytes == values * (old * 3 // 8 + (300 - old) * 4)
    keys = cache.layers[0].keys
    assert torch.equal(keys[:, :, old:], recording.layers[0].k[:, :, old:])
    assert keys[0, 0, :32, 0].unique().numel() <= 4 < keys[0, 0, :32].unique().numel()
