"""auto: gates where there are some for the model, and what it says about it."""

import pytest
import torch

from python_tests.gates.make_gates import random_gates
from python_tests.hf.tiny import prompts, tiny
from smartkv_ext import SmartKVCache, patch
from smartkv_ext.gates import ModelFacts, find_shipped_gates, lookup
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.hf.gate_check import sketch_of
from smartkv_ext.policies import get_policy
from smartkv_ext.policies.auto import WITH_GATES, WITHOUT_GATES


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """The package with gates for tiny("qwen2") alone, which want most bytes in the last layer."""
    model = tiny("qwen2")
    shares = torch.tensor([0.5, 0.5, 1.0, 2.0])
    gates = random_gates(ModelFacts.from_config(model.config), sketch=sketch_of(model), layer_shares=shares)
    gates.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(lookup, "FOLDER", tmp_path)
    find_shipped_gates.cache_clear()
    yield model
    find_shipped_gates.cache_clear()


def filled(model, policy):
    ids, _ = prompts(1, 300)
    cache = SmartKVCache(model.config, budget=0.5, policy=policy, window=32, min_tokens=0)
    with torch.no_grad(), patch(model):
        model(ids[:, :280], **cache_kwargs(cache))
        for i in range(280, 300):
            model(ids[:, i : i + 1], **cache_kwargs(cache))
    return cache


def assert_same_records(a, b):
    assert sum(int(layer.store.cache_seqlens.sum()) for layer in a.layers) > 0
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert torch.equal(mine.store.positions(), theirs.store.positions())
        assert torch.equal(mine.store.scores(), theirs.store.scores())


def test_a_model_with_shipped_gates_gets_them(shipped):
    cache = filled(shipped, "auto")
    assert cache.report().policy.startswith("auto: union(gate,") and "auto: union(gate" in str(cache.report())
    assert_same_records(cache, filled(shipped, WITH_GATES))
    policy = cache.smartkv_config.policy
    assert [policy.layer_share(i, 4, 2) for i in range(4)] == [0.5, 0.5, 1.0, 2.0]
    assert policy.shared_bytes > 0 and policy.scores_keys


def test_a_model_without_gates_gets_a_union(shipped):
    other = tiny("llama", num_key_value_heads=4)
    cache = filled(other, "auto")
    assert cache.report().policy == "auto: union(keydiff, expected_attention)"
    assert_same_records(cache, filled(other, WITHOUT_GATES))


def test_another_model_of_the_same_shape_is_not_given_foreign_gates(shipped, tmp_path):
    other = tiny("qwen2", seed=5)
    with pytest.raises(ValueError, match="belong to another model"):
        filled(other, "gate")
    cache = filled(other, "auto")
    assert cache.report().policy == "auto: union(keydiff, expected_attention)" and cache.report().shared_bytes == 0
    assert_same_records(cache, filled(other, WITHOUT_GATES))
    cache.save(tmp_path / "cache.safetensors")
    again = SmartKVCache.load(tmp_path / "cache.safetensors", other.config)
    assert again.report() == cache.report()


def test_a_saved_cache_keeps_its_gates(shipped, tmp_path):
    cache = filled(shipped, "auto")
    cache.save(tmp_path / "cache.safetensors")
    again = SmartKVCache.load(tmp_path / "cache.safetensors", shipped.config)
    assert again.report() == cache.report() and again.smartkv_config == cache.smartkv_config
    assert again.smartkv_config.policy.scores_keys and get_policy("auto") != again.smartkv_config.policy


def test_own_gates_are_mixed_as_the_default_mixes(shipped, tmp_path_factory):
    """In place of the package's, with the same reserve; a saved cache names them."""
    tmp_path = tmp_path_factory.mktemp("outside")  # of the package
    own = random_gates(ModelFacts.from_config(shipped.config), seed=7, sketch=sketch_of(shipped))
    own.save_pretrained(tmp_path / "own")
    cache = filled(shipped, {"name": "auto", "gates": str(tmp_path / "own")})
    assert cache.report().policy == "auto: union(gate, 0.2 keydiff)"
    gate = {"name": "gate", "gates": str(tmp_path / "own")}
    assert_same_records(cache, filled(shipped, {"name": "union", "parts": [gate, "keydiff"], "weights": [1, 0.2]}))
    assert not torch.equal(cache.layers[-1].store.scores(), filled(shipped, "auto").layers[-1].store.scores())
    cache.save(tmp_path / "cache.safetensors")
    again = SmartKVCache.load(tmp_path / "cache.safetensors", shipped.config)
    assert again.report() == cache.report() and again.smartkv_config.policy.gates == str(tmp_path / "own")


def test_own_gates_that_do_not_fit_are_refused(shipped, tmp_path):
    policy = {"name": "auto", "gates": str(tmp_path / "tiny")}
    with pytest.raises(ValueError, match="does not exist"):
        SmartKVCache(shipped.config, policy=policy | {"gates": str(tmp_path / "nowhere")}, min_tokens=0)
    with pytest.raises(ValueError, match="belong to another model: this one has"):
        SmartKVCache(tiny("llama", num_key_value_heads=4).config, policy=policy)
    with pytest.raises(ValueError, match="belong to another model of the same shape"):
        filled(tiny("qwen2", seed=5), policy)
