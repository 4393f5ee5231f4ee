"""The gate as a policy: what the cache keeps is what the gate ranks highest, however the tokens came."""

import copy

import pytest
import torch
from gates.make_gates import random_gates
from hf.tiny import prompts, tiny
from policies.views import make_records, make_view, valid

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.gates import ModelFacts
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.hf.gate_check import sketch_of
from smartkv_ext.hf.patching import attention_modules
from smartkv_ext.policies import get_policy


def gate_of(model, **options):
    gates = random_gates(ModelFacts.from_config(model.config), sketch=sketch_of(model))
    return get_policy(options.pop("name", "gate"), gates=gates, **options)


def own_scores(model, ids, gates):
    """(layers, kv_heads, n): the gate on the model's k_proj outputs, without a cache."""
    keys = []
    hooks = [
        m.k_proj.register_forward_hook(lambda _m, _a, out: keys.append(out.unflatten(-1, (-1, 64)).transpose(1, 2)))
        for m in attention_modules(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return gates.score(keys)[:, 0]


@pytest.mark.parametrize("chunks", [[200], [120, 80], [150, *[1] * 50], [130, *[4] * 15, 10]])
def test_the_cache_keeps_what_the_gate_ranks_highest(chunks):
    model = tiny("qwen2")
    ids, _ = prompts(1, 200)
    policy = gate_of(model)
    cache = SmartKVCache(model.config, budget=None, policy=policy, window=16, sinks=4, tiers=(16,), min_tokens=0)
    want = own_scores(model, ids, policy.gates)
    with smartkv_ext.patch(model), torch.no_grad():
        for piece in ids.split(chunks, 1):
            model(piece, **cache_kwargs(cache))
    for i, layer in enumerate(cache.layers):
        assert layer.arrived is None
        positions, scores = layer.store.positions()[0, :, 0], layer.store.scores()[0, :, 0]
        for head in range(2):
            here = positions[head] >= 0
            torch.testing.assert_close(
                scores[head][here], want[i, head][positions[head][here].long()], rtol=0.02, atol=0.02
            )
    held = cache.layers[0].window
    torch.testing.assert_close(
        held.held("key_score")[0, :, 4:, 0], want[0][:, held.held_positions()[0, 4:].long()], rtol=0.02, atol=0.02
    )


def test_a_decoding_step_scores_all_layers_in_one_launch(monkeypatch):
    model = tiny("qwen2")
    ids, _ = prompts(1, 60)
    policy = gate_of(model)
    launches = []
    score = policy.gates.score
    monkeypatch.setattr(policy.gates, "score", lambda keys, *rest: launches.append(len(keys)) or score(keys, *rest))
    cache = SmartKVCache(model.config, budget=None, policy=policy, window=16, min_tokens=0)
    with smartkv_ext.patch(model), torch.no_grad():
        model(ids[:, :50], **cache_kwargs(cache))
        assert launches == [1] * 4
        for i in range(50, 60):
            model(ids[:, i : i + 1], **cache_kwargs(cache))
    assert launches[4:] == [4] * 10


def test_padding_and_beams_and_files_carry_the_scores(tmp_path):
    model = tiny("qwen2")
    ids, mask = prompts(3, 150)
    gate_of(model).gates.save_pretrained(tmp_path / "gates")
    with smartkv_ext.patch(model):
        options = {"budget": 0.25, "policy": get_policy("gate", gates=str(tmp_path / "gates")), "window": 16}
        cache = SmartKVCache(model.config, **options, min_tokens=0)
        model.generate(ids, attention_mask=mask, **cache_kwargs(cache), max_new_tokens=8, do_sample=False)
        alone = SmartKVCache(model.config, **options, min_tokens=0)
        model.generate(ids[:1], **cache_kwargs(alone), max_new_tokens=8, do_sample=False)
        a, b = cache.layers[2].window.held("key_score")[0], alone.layers[2].window.held("key_score")[0]
        torch.testing.assert_close(a[:, -16:], b[:, -16:], rtol=0.02, atol=0.02)
        cache.save(tmp_path / "cache.safetensors")
        again = SmartKVCache.load(tmp_path / "cache.safetensors", model.config)
        assert again.report().total_bytes == cache.report().total_bytes
        assert torch.equal(again.layers[1].window.held("key_score"), cache.layers[1].window.held("key_score"))
        assert copy.deepcopy(again).smartkv_config.policy.gates == again.smartkv_config.policy.gates
        beams = SmartKVCache(model.config, **options, min_tokens=0)
        model.generate(ids, attention_mask=mask, **cache_kwargs(beams), max_new_tokens=6, num_beams=2)


def test_bytes_are_counted_and_weights_are_reported():
    model = tiny("qwen2")
    ids, _ = prompts(1, 400)
    policy = gate_of(model)
    cache = SmartKVCache(model.config, budget=0.25, policy=policy, window=16, min_tokens=0)
    with smartkv_ext.patch(model), torch.no_grad():
        model(ids, **cache_kwargs(cache))
    report = cache.report()
    assert report.total_bytes <= 0.25 * report.full_bytes
    assert report.shared_bytes == 4 * policy.gates.num_parameters and report.key_basis_bytes == 0
    assert "gate weights, shared" in str(report)


def test_a_wrong_model_is_refused():
    model = tiny("qwen2")
    policy = gate_of(model)
    with pytest.raises(ValueError, match="belong to another model: this one has num_layers 2, not 4"):
        SmartKVCache(tiny("qwen2", num_hidden_layers=2).config, policy=policy)
    twin = tiny("qwen2", seed=9)
    cache = SmartKVCache(twin.config, policy=policy, min_tokens=0)
    with smartkv_ext.patch(twin), pytest.raises(ValueError, match="another model of the same shape"):
        twin(prompts(1, 30)[0], **cache_kwargs(cache))
    with pytest.raises(ValueError, match="no gates for this model come with the package"):
        SmartKVCache(model.config, policy="gate", min_tokens=0)
    with pytest.raises(ValueError, match="no gates for this model come with the package"):
        SmartKVCache(model.config, policy=get_policy("evolved", expression="recent + gate"), min_tokens=0)
    cache = SmartKVCache(
        twin.config, policy=get_policy("evolved", expression="recent + gate", gates=policy.gates), min_tokens=0
    )
    with smartkv_ext.patch(twin), pytest.raises(ValueError, match="another model of the same shape"):
        twin(prompts(1, 30)[0], **cache_kwargs(cache))


def view_with_scores(scores, **options):
    view = make_view(n=scores.shape[2], **options)
    view.key_scores = scores
    return view


def test_tokens_below_a_threshold_go():
    gates = random_gates(quantiles=torch.linspace(-10, 0, 257))
    scores = torch.randn(2, 2, 40) * 3 - 4
    view = view_with_scores(scores)
    for options, least in (({"threshold": -3.0}, -3.0), ({"retention": 0.25}, -2.5)):
        got = get_policy("gate", gates=gates, recency=0.0, **options).score(view)
        assert torch.equal(got, scores.masked_fill(scores < least, -torch.inf))
    calibration = torch.tensor([1.0, 0.0]).expand(4, 2, 2).clone()
    calibration[1, 1] = torch.tensor([1.0, 4.0])
    sure = get_policy("gate", gates=random_gates(calibration=calibration), probability=0.5, recency=0.0)
    sure = sure.score(view)
    assert torch.equal(sure, scores.masked_fill(scores < torch.tensor([0.0, -4.0])[:, None], -torch.inf))


def test_age_counts_as_each_head_forgets():
    decay = torch.rand(4, 2)
    policy = get_policy("gate", gates=random_gates(decay=decay), recency=0.5)
    scores = torch.randn(2, 2, 40)
    view = view_with_scores(scores)
    age = (40 - view.positions)[:, None]
    fall = ((age + 64) / 64).log()
    want = scores - 0.5 * decay[1][:, None] * fall
    assert torch.allclose(policy.score(view)[valid(view)], want[valid(view)], atol=1e-5)
    plain = get_policy("gate", gates=random_gates()).score(view)
    assert torch.allclose(plain[valid(view)], (scores - fall)[valid(view)], atol=1e-5)
    records = make_records()
    fall = ((records.seen - records.positions + 64) / 64).log()
    want = records.stored - 0.5 * decay[2][:, None] * fall
    here = records.positions >= 0
    assert torch.allclose(policy.refresh(records)[here], want[here], atol=1e-5)
    assert torch.equal(policy.carried(want, None, 2, 0, records.stored), records.stored)


def test_options_that_cannot_be():
    gates = random_gates()
    for options, sentence in (
        ({"threshold": 0.0, "retention": 0.5}, "give one of threshold, probability and retention"),
        ({"retention": 0.5}, "no quantiles"),
        ({"probability": 0.5}, "no calibration"),
        ({"threshold": float("nan")}, "threshold must be a number; got nan"),
        ({"recency": -1.0}, "recency must be a number of at least 0; got -1.0"),
        ({"gates": "/nowhere"}, "does not exist"),
    ):
        with pytest.raises(ValueError, match=sentence):
            get_policy("gate", **({"gates": gates} | options))
    with pytest.raises(ValueError, match="never saved"):
        get_policy("gate", gates=gates).spec()


def test_hybrid_splits_the_layers():
    policy = get_policy("gate_hybrid", gates=random_gates(), local_layers=1, gate_layers=[2], recent=8, local_window=4)
    kept = []
    for layer in range(4):
        view = view_with_scores(torch.zeros(2, 2, 40))
        view.layer_idx = layer
        kept.append(int((policy.score(view)[0, 0] > -torch.inf).sum()))
    assert kept == [4, 8, 40, 8]
    assert [policy.layer_share(i, 4, 2) for i in range(4)] == [0, 0, 4, 0]
    mean = torch.tensor([2.0, 2.0, 0.0, 0.0])  # gates that give nothing to the layers that follow them
    policy = get_policy("gate_hybrid", gates=random_gates(layer_shares=mean), local_layers=2)
    assert [policy.layer_share(i, 4, 2) for i in range(4)] == [0, 0, 2, 2]
    with pytest.raises(ValueError, match="some layer of 4 must follow its gates"):
        get_policy("gate_hybrid", local_layers=4).check(4, 2)
    with pytest.raises(ValueError, match=r"gate_layers must be layers from 0 to 3; got \[-1, 9\]"):
        get_policy("gate_hybrid", gate_layers=[2, 9, -1]).check(4, 2)


def test_gates_inside_other_policies(tmp_path):
    model = tiny("qwen2")
    ids, _ = prompts(1, 300)
    gate_of(model).gates.save_pretrained(tmp_path)
    gate = {"name": "gate", "gates": str(tmp_path)}
    streaming = {"layers": 0, "policy": {"name": "streaming_llm", "recent": 32}}
    for policy in (
        get_policy("adakv", base=gate, floor=0.3),
        get_policy("map", default=gate, rules=[streaming, {"layers": 1, "policy": gate | {"threshold": 0.5}}]),
    ):
        cache = SmartKVCache(model.config, budget=0.3, policy=policy, window=16, min_tokens=0)
        with smartkv_ext.patch(model), torch.no_grad():
            model(ids, **cache_kwargs(cache))
        report = cache.report()
        assert report.shared_bytes > 0 and report.total_bytes <= 0.3 * report.full_bytes
    with pytest.raises(ValueError, match="gates of a map must all be the same"):
        get_policy("map", default=gate, rules=[{"layers": 0, "policy": "gate"}])
