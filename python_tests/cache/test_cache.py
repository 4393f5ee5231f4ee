"""Budget, accounting, persistence and bad input."""

import copy
import json
import re

import pytest
import torch
from hf.tiny import generate, prompts, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.cache.compress import compress
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.quant import QuantSpec, parse_budget


def held_bytes(cache):
    """Bytes of every distinct storage reachable from the cache, found without the cache's own accounting."""
    storages, todo, seen = {}, [cache], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        elif isinstance(item, dict):
            todo += list(item.values())
        elif isinstance(item, (list, tuple)):
            todo += list(item)
        elif type(item).__module__.startswith("smartkv_ext") or isinstance(item, SmartKVCache):
            todo += list(vars(item).values())
    return sum(storages.values())


@pytest.mark.parametrize(
    "policy", ["keydiff", "snapkv", "knorm", "tova", "random", "streaming_llm", "h2o", "layer_aware"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_is_kept_and_accounting_is_exact(policy, dtype):
    """From 8 windows on, at prefill and at every decoded token."""
    model = tiny("qwen2").to(dtype)
    ids, _mask = prompts(1, 1024)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=0.125, policy=policy, window=128, min_tokens=0)
        model(ids, **cache_kwargs(cache))
        for step in range(80):
            report = cache.report()
            assert report.full_bytes == (1024 + step) * 4 * 2 * 64 * 4
            assert report.total_bytes <= 0.125 * report.full_bytes, (step, str(report))
            assert abs(held_bytes(cache) - report.total_bytes) <= 0.02 * report.total_bytes
            assert sum(report.parts.values()) == report.total_bytes
            model(ids[:, step : step + 1], **cache_kwargs(cache))
    assert report.total_bytes >= 0.085 * report.full_bytes, f"bytes are left unused: {report}"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_budget_is_kept_in_every_scope(scope):
    model = tiny("qwen2")
    ids, mask = prompts(2, 1500)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=0.125, policy="keydiff", window=128, scope=scope, min_tokens=0)
        model(ids, attention_mask=mask, **cache_kwargs(cache))
    report = cache.report()
    assert report.total_bytes <= 0.125 * report.full_bytes, str(report)


@pytest.mark.parametrize("budget", [0.125, "400kB"])
def test_budget_is_kept_by_rows_of_very_different_length(budget):
    model = tiny("qwen2")
    ids, mask = prompts(3, 3000)
    mask[1, :2980] = 0
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=budget, policy="knorm", window=128, min_tokens=0)
        model(ids, attention_mask=mask, **cache_kwargs(cache))
    report = cache.report()
    limit = 400_000 if budget == "400kB" else 0.125 * report.full_bytes
    assert report.total_bytes <= limit, str(report)


def test_fixed_bytes_hold_while_the_context_grows():
    model = tiny("qwen3")
    ids, _mask = prompts(1, 600)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget="300kB", policy="knorm", window=32, min_tokens=0)
        for start in range(0, 2400, 150):
            model(ids[:, start % 600 : start % 600 + 150], **cache_kwargs(cache))
            assert cache.report().total_bytes <= 300_000
    kept = cache.report().tokens_per_tier
    assert kept["evicted"] > 500


def test_unlimited_budget_takes_the_highest_tier():
    model = tiny("qwen2")
    ids, _mask = prompts(1, 300)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=None, policy="full", tiers=(4,), min_tokens=0)
        model(ids, **cache_kwargs(cache))
    assert cache.report().tokens_per_tier == {"window": 132.0, "4": 168.0, "evicted": 0.0}


def test_ragged_rows_hold_their_own_tokens():
    """Padding is never stored: a padded row holds what it would hold alone."""
    model = tiny("qwen2")
    ids, mask = prompts(3, 300)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=None, policy="full", tiers=(8,), window=16, min_tokens=0)
        model(ids, attention_mask=mask, **cache_kwargs(cache))
    for layer in cache.layers:
        positions = torch.cat(
            [layer.store.positions().flatten(2), layer.window.held_positions()[:, None].expand(-1, 2, -1)], 2
        )
        for row in range(3):
            expected = mask[row].nonzero().flatten().int()
            for head in range(2):
                held = positions[row, head]
                assert torch.equal(held[held >= 0].sort().values, expected)


def test_save_and_load(tmp_path):
    model = tiny("qwen3_hybrid")
    ids, mask = prompts(3)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, budget=0.5, policy="snapkv", window=24, tiers=(3, 8), min_tokens=0)
        out = generate(model, ids, mask, cache, new=30)
        cache.save(tmp_path / "cache.safetensors")
        loaded = SmartKVCache.load(tmp_path / "cache.safetensors", model.config)
        assert loaded.report() == cache.report()
        assert loaded.smartkv_config == cache.smartkv_config
        turn = torch.cat([out.sequences, torch.full((3, 4), 7)], 1)
        longer = torch.nn.functional.pad(mask, (0, turn.shape[1] - mask.shape[1]), value=1)
        a, b = (generate(model, turn, longer, c, new=30) for c in (cache, loaded))
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def test_files_of_page_format_1_load(tmp_path):
    """They have tiers of equal bits alone, whose pages are as they were."""
    model, path = tiny("qwen2"), tmp_path / "cache.safetensors"
    ids, mask = prompts(1)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, budget=0.5, policy="snapkv", window=24, tiers=(2, 3, 4, 8, 16), min_tokens=0)
        generate(model, ids, mask, cache)
        cache.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["smartkv_cache"])
    tensors = load_file(path)
    assert header["page_format_version"] == 2
    save_file(tensors, path, {"smartkv_cache": json.dumps(header | {"page_format_version": 1})})
    loaded = SmartKVCache.load(path, model.config)
    assert loaded.report() == cache.report() and loaded.smartkv_config == cache.smartkv_config
    save_file(tensors, path, {"smartkv_cache": json.dumps(header | {"page_format_version": 3})})
    with pytest.raises(ValueError, match="page_format_version 3; this smartkv_ext reads 1 and 2"):
        SmartKVCache.load(path, model.config)


def test_tiers_are_read_as_people_write_them():
    assert QuantSpec.create(["16", " k3v2", 403, 2], "gaussian", True).tiers == (2, 302, 403, 16)


def test_load_refuses_what_it_cannot_trust(tmp_path):
    model = tiny("qwen2")
    ids, _mask = prompts(1)
    path = tmp_path / "cache.safetensors"
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, min_tokens=0)
        model(ids, **cache_kwargs(cache))
    cache.save(path)
    with pytest.raises(ValueError, match="belongs to another model"):
        SmartKVCache.load(path, tiny("qwen2", num_hidden_layers=3).config)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        SmartKVCache.load(tmp_path / "missing", model.config)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        SmartKVCache.load(path, model.config)
    newer = re.sub(rb'(\{\\"format_version\\": )4', rb"\g<1>9", data)
    assert newer != data
    path.write_bytes(newer)
    with pytest.raises(ValueError, match="format_version 9"):
        SmartKVCache.load(path, model.config)


@pytest.mark.parametrize(
    ("text", "fraction", "num_bytes"),
    [(0.25, 0.25, None), ("0.5", 0.5, None), ("1/8", 0.125, None), (" 3 / 4 ", 0.75, None),
     ("1/1", 1.0, None), (1, 1.0, None), ("64MB", None, 64_000_000), ("1.5 GiB", None, 3 * 2**29),
     ("4bits", 0.25, None), ("2.5 bits", 2.5 / 16, None), (None, None, None)],
)  # fmt: skip
def test_budget_spellings(text, fraction, num_bytes):
    budget = parse_budget(text)
    assert (budget.fraction, budget.num_bytes) == (fraction, num_bytes)


@pytest.mark.parametrize(
    "text", [0, -1, 2, 1.5, "64 bananas", "", "0MB", "17bits", "MB", "3/2", "0/8", "1/0", "1/8 MB", "1/", float("nan")]
)
def test_bad_budgets_are_refused(text):
    with pytest.raises(ValueError, match=r"budget must be a fraction in \(0, 1\]"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(budget=[1]), TypeError, "budget must be"),
        (dict(policy="magic"), ValueError, "magic"),
        (dict(tiers=(5,)), ValueError, "tiers must be distinct values of 2, K3V2, 3, K4V3, 4, 8, 16; got"),
        (dict(tiers=()), ValueError, "tiers must be"),
        (dict(tiers=4), TypeError, "tiers must be a sequence of bits, of 2, K3V2, 3, K4V3, 4, 8, 16; got 4"),
        (dict(tiers="2,3"), TypeError, "tiers must be a sequence"),
        (dict(tiers=(4, 4)), ValueError, "tiers must be distinct"),
        (dict(tiers=("K3V2", 302)), ValueError, "tiers must be distinct"),
        (dict(tiers=("K2V3", 4)), ValueError, "tiers must be distinct"),
        (dict(sinks=-1), ValueError, "sinks must be at least 0; got -1"),
        (dict(window=0), ValueError, "window must be at least 1; got 0"),
        (dict(window=1.5), TypeError, "window must be an int"),
        (dict(scope="row"), ValueError, "scope must be one of head, layer, global; got 'row'"),
        (dict(levels="fancy"), ValueError, "levels must be one of uniform, gaussian"),
        (dict(budget="2kB"), ValueError, "budget must be at least"),
        (dict(budget=1e-5, min_tokens=0), ValueError, "budget must be at least"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SmartKVCache(tiny("qwen2").config, **arguments)


def test_bad_models_are_named():
    with pytest.raises(
        TypeError, match=r"config must be a model or a transformers config, as model.config is; got str"
    ):
        SmartKVCache("qwen2", min_tokens=0)
    with pytest.raises(ValueError, match="head_dim must be one of 64, 80, 96, 128, 256; got 32"):
        SmartKVCache(tiny("qwen3", head_dim=32).config)
    with pytest.raises(ValueError, match="scope must be head or layer"):
        SmartKVCache(tiny("qwen3_hybrid").config, scope="global")
    with pytest.raises(TypeError, match="must be a transformers model"):
        smartkv_ext.patch(torch.nn.Linear(2, 2))


def test_misuse_of_the_integration():
    model = tiny("qwen2")
    ids, mask = prompts(2)
    with pytest.raises(RuntimeError, match="needs a patched model"):
        generate(model, ids, mask, SmartKVCache(model.config, min_tokens=0))
    handle = smartkv_ext.patch(model)
    with pytest.raises(ValueError, match="already patched"):
        smartkv_ext.patch(model)
    with pytest.raises(NotImplementedError, match="4D"):
        model(ids, attention_mask=torch.ones(2, 1, 150, 150), **cache_kwargs(SmartKVCache(model.config, min_tokens=0)))
    with pytest.raises(NotImplementedError, match="output_attentions must be False"):
        model(ids, output_attentions=True, **cache_kwargs(SmartKVCache(model.config, min_tokens=0)))
    cache = SmartKVCache(model.config, min_tokens=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, **cache_kwargs(cache))
        with pytest.raises(ValueError, match="key_states must be"):
            model(ids[:1, :1], **cache_kwargs(cache))
        model.to(torch.bfloat16)
        with pytest.raises(ValueError, match=r"torch\.bfloat16"):
            model(ids[:, :1], **cache_kwargs(cache))
    with pytest.raises(NotImplementedError, match="offloading"):
        cache.layers[0].offload()
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == "sdpa"


def test_a_failed_step_leaves_the_cache_as_it_was(monkeypatch):
    """Packing fails in some layer after others have already taken the tokens in."""
    model = tiny("qwen2")
    ids, _mask = prompts(1, 900)

    def fail(layers, scale):
        if layers[0].layer_idx == 2:
            raise ValueError("no memory")
        return compress(layers, scale)

    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=None, policy="full", window=16, tiers=(16,))
        model(ids[:, :100], **cache_kwargs(cache))
        before = copy.deepcopy(cache)
        with monkeypatch.context() as m, pytest.raises(ValueError, match="no memory"):
            m.setattr("smartkv_ext.cache.cache.compress", fail)
            model(ids[:, 100:], **cache_kwargs(cache))
        assert cache.get_seq_length() == 100
        assert {layer.seen for layer in cache.layers} == {100}
        a = model(ids[:, :3], **cache_kwargs(cache)).logits
        b = model(ids[:, :3], **cache_kwargs(before)).logits
    assert (a - b).abs().max() < 1e-4  # two layers have packed, at 16 bits


def test_patching_a_copy_of_a_patched_model():
    model = tiny("qwen2")
    ids, mask = prompts(1)
    smartkv_ext.patch(model)
    twin = copy.deepcopy(model)
    a = generate(model, ids, mask, SmartKVCache(model.config, budget=0.5, window=24, min_tokens=0))
    b = generate(twin, ids, mask, SmartKVCache(model.config, budget=0.5, window=24, min_tokens=0))
    assert torch.equal(a.sequences, b.sequences)


def test_default_tiers_depend_on_whether_anything_is_evicted():
    config = tiny("qwen2").config
    assert SmartKVCache(config, policy="keydiff").smartkv_config.quant.tiers == (302, 403, 4, 8, 16)
    assert SmartKVCache(config, budget=0.5, policy="full").smartkv_config.quant.tiers == (
        2,
        302,
        403,
        4,
        8,
        16,
    )
