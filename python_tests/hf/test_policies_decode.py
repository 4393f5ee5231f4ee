"""Every policy over a long answer: padded batch, eviction while decoding, within the bytes; files, crops, scopes."""

import pytest
import torch
from gates.make_gates import usable
from hf.tiny import generate, prompts, tiny

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import POLICIES

RULES = [
    {"layers": "0", "policy": {"name": "streaming_llm", "recent": 16}, "share": 0},
    {"layers": "1-2", "heads": 0, "policy": "layer_aware"},
    {"layers": 3, "heads": 1, "policy": "expected_attention", "share": 2},
]
EVICTING = sorted(set(POLICIES) - {"full", "map"})
GATED = {"name": "evolved", "expression": "recent * exp(gate / 4)"}
ALL = [*EVICTING, {"name": "map", "rules": RULES}, {"name": "adakv", "base": "knorm"}, GATED]


def label(spec):
    return spec if isinstance(spec, str) else spec["name"]


def evicted(cache):
    return cache.report().tokens_per_tier["evicted"]


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_512_new_tokens_in_a_padded_batch(spec):
    """Eviction goes on while decoding, every step within the budget."""
    model = tiny("qwen2", num_hidden_layers=4 if "map" in str(spec) else 2)
    ids, mask = prompts(2, 200)
    limit = 105_000 * model.config.num_hidden_layers
    with smartkv_ext.patch(model), torch.inference_mode():
        cache = SmartKVCache(model.config, budget=f"{limit}b", policy=usable(spec, model), window=48, min_tokens=0)
        logits = model(ids, attention_mask=mask, **cache_kwargs(cache)).logits
        before = evicted(cache)
        for step in range(512):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = logits[:, -1:].argmax(-1)
            logits = model(token, attention_mask=mask, **cache_kwargs(cache)).logits
            if step % 16 == 0:
                assert cache.report().total_bytes <= limit, (step, str(cache.report()))
    assert torch.isfinite(logits).all()
    assert evicted(cache) > before + 50
    for layer in cache.layers:  # nothing is held twice, nothing that was never there
        for row in range(2):
            positions = layer.store.positions()[row].flatten(1)
            window = layer.window.held_positions()[row]
            for head in range(2):
                held = torch.cat([positions[head], window])
                held = held[held >= 0]
                assert len(held.unique()) == len(held) and held.max() == 711
                assert mask[row, held].all()


@pytest.mark.parametrize("scope", ["head", "layer", "global"])
@pytest.mark.parametrize(("tiers", "budget"), [((2,), 0.25), ((3, 8), 0.35), ((16,), 0.9)], ids=str)
@pytest.mark.parametrize("name", ["h2o", "pyramidkv", "expected_attention", "layer_aware", "adakv", "evolved"])
def test_every_scope_and_tier_allocation(name, tiers, budget, scope):
    model = tiny("qwen2", num_hidden_layers=3)
    ids, mask = prompts(2, 500)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(
            model.config, budget=budget, policy=name, tiers=tiers, scope=scope, window=32, min_tokens=0
        )
        generate(model, ids, mask, cache, new=40)
    report = cache.report()
    assert report.ratio <= budget and evicted(cache) > 20 < sum(report.tokens_per_tier[str(t)] for t in tiers)
    kept = [layer.store.positions().flatten(2).sort(-1).values for layer in cache.layers]
    same_heads = all(torch.equal(k[:, 0], k[:, 1]) for k in kept)
    assert same_heads == (scope != "head")


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_saved_and_loaded_it_goes_on_as_before(tmp_path, spec):
    model = tiny("qwen3")
    ids, mask = prompts(2, 300)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(
            model.config, budget=0.5, policy=usable(spec, model, tmp_path / "gates"), window=24, min_tokens=0
        )
        out = generate(model, ids, mask, cache, new=21)
        cache.save(tmp_path / "cache.safetensors")
        loaded = SmartKVCache.load(tmp_path / "cache.safetensors", model.config)
        assert loaded.report() == cache.report() and loaded.smartkv_config == cache.smartkv_config
        turn = torch.cat([out.sequences, torch.full((2, 4), 7)], 1)
        longer = torch.nn.functional.pad(mask, (0, turn.shape[1] - mask.shape[1]), value=1)
        a, b = (generate(model, turn, longer, c, new=40) for c in (cache, loaded))
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_crop_then_go_on(spec):
    model = tiny("qwen2")
    ids, mask = prompts(2, 300)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=0.6, policy=usable(spec, model), window=24, min_tokens=0)
        model(ids, attention_mask=mask, **cache_kwargs(cache))
        cache.crop(-120)
        assert all(layer.store.is_empty or int(layer.store.positions().max()) < 180 for layer in cache.layers)
        for begin in range(180, 300, 30):
            model(ids[:, begin : begin + 30], attention_mask=mask[:, : begin + 30], **cache_kwargs(cache))
    assert cache.get_seq_length() == 300 and cache.report().ratio <= 0.6


def test_assisted_decoding_runs_with_a_policy_that_accumulates():
    model = tiny("qwen2")
    ids, mask = prompts(1, 100)
    ids, mask = torch.cat([ids, ids], 1), torch.cat([mask, mask], 1)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, budget=0.4, policy="layer_aware", window=32, min_tokens=0)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=60, do_sample=False, **cache_kwargs(cache),
            prompt_lookup_num_tokens=4,
        )  # fmt: skip
    assert out.shape[1] == 260 and evicted(cache) > 20


def test_layers_get_what_the_policy_says():
    """pyramidkv: pages fall from layer to layer; a map with share 0: no pages at all."""
    model = tiny("qwen2")
    ids, _mask = prompts(1, 1500)
    held = {}
    for spec in ("snapkv", "pyramidkv", {"name": "map", "default": "snapkv", "rules": RULES[:1]}):
        with smartkv_ext.patch(model), torch.no_grad():
            cache = SmartKVCache(model.config, budget=0.25, policy=usable(spec, model), window=32, min_tokens=0)
            model(ids, **cache_kwargs(cache))
        assert cache.report().ratio <= 0.25
        held[str(spec)] = [sum(pool.nbytes for pool in layer.store.pools) for layer in cache.layers]
    even, pyramid, split = held.values()
    assert max(even) - min(even) < 0.1 * max(even)
    first, last = 1.95, 0.05
    expected = [first - (first - last) * i / 3 for i in range(4)]
    for got, share in zip(pyramid, expected, strict=True):
        assert got == pytest.approx(share * even[0], abs=0.12 * even[0])
    assert split[0] == 0 and all(x > 1.2 * even[0] for x in split[1:])


def test_heads_share_a_layers_budget_with_a_floor():
    """One head whose keys are tiny: by raw knorm it would take everything; the floor leaves the other some."""
    model = tiny("qwen2")
    ids, _mask = prompts(1, 1200)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[:64] *= 0.02
            layer.self_attn.k_proj.bias[:64] *= 0.02
    records = {}
    for floor in (0.0, 0.3, 1.0, None):
        spec = "knorm" if floor is None else {"name": "adakv", "base": "knorm", "floor": floor}
        with smartkv_ext.patch(model), torch.no_grad():
            cache = SmartKVCache(
                model.config, budget=0.125, policy=usable(spec, model), window=32, tiers=(3,), min_tokens=0
            )
            model(ids, **cache_kwargs(cache))
        assert cache.report().ratio <= 0.125
        records[floor] = cache.layers[1].store.cache_seqlens[0, :, 0].tolist()
    assert records[0.0][1] == 0 < records[0.0][0]
    assert 0 < records[0.3][1] < records[0.3][0]
    assert records[1.0][1] == pytest.approx(records[1.0][0], abs=64)
    assert records[None][0] == records[None][1], "a policy whose scores do not compare splits evenly"
