"""Short contexts are kept; a cache never costs more than the full one; budgets are kept or refused."""

import warnings

import pytest
import torch
from hf.tiny import assert_same, generate, prompts, tiny

from smartkv_ext import SmartKVCache
from smartkv_ext.cache.config import STATE_SHARE
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import POLICIES

NAMED = [name for name in POLICIES if name not in ("map", "gate", "gate_hybrid")]  # the others need files
TABLES = 16  # bytes per layer: tokens of the row, position and slot; further 8 once


def full_bytes(model, tokens):
    config = model.config
    return tokens * config.num_hidden_layers * config.num_key_value_heads * 64 * 2 * model.dtype.itemsize


@pytest.mark.parametrize("policy", NAMED)
def test_never_above_the_full_cache(policy):
    """At every token; before the first packing it holds positions, sums and queries of the policy beside it."""
    model = tiny("qwen2", num_hidden_layers=2).to(torch.bfloat16)
    ids, _ = prompts(1, 2000)
    cache = SmartKVCache(model, budget="1/4", policy=policy)
    sums = len(cache.smartkv_config.sums) * 4 * 2  # per token, two KV heads
    queries = cache.smartkv_config.policy.decode_queries and 16 * 512
    at, layers = 0, 2
    with torch.no_grad():
        while at < 2000:
            step = 1 if at < 160 or at % 500 < 20 else 20
            model(ids[:, at : at + step], **cache_kwargs(cache))
            at += step
            full = full_bytes(model, at)
            if at < 129:
                tables = 8 + layers * (TABLES + at * (4 + sums))
                assert full <= cache.nbytes <= full + tables + layers * queries * (at > 112), at
            else:
                assert cache.nbytes <= max(full * 0.25, full_bytes(model, 128)), at
    assert at == 2000 and cache.report().tokens_per_tier["evicted"] >= 0


def test_a_short_context_is_the_full_cache():
    """72 tokens are simply kept, whatever the fraction; so are up to 128, and more under bytes that hold them."""
    model = tiny("qwen2")
    ids, mask = prompts(1, 72)
    reference = generate(model, ids, mask, new=56)
    for budget in ("1/2", "1/8", 0.01):
        cache = SmartKVCache(model, budget=budget)
        assert_same(reference, generate(model, ids, mask, cache, new=56))
        kept = cache.report().tokens_per_tier
        assert kept.pop("window") == 127 and not any(kept.values())
    model = model.to(torch.bfloat16)
    cache = SmartKVCache(model, budget="1MB", policy="keydiff")  # 512 bytes a token and layer, 4 of its position
    with torch.no_grad():
        model(prompts(1, 480)[0], **cache_kwargs(cache))
        assert cache.report().tokens_per_tier["window"] == 480 and cache.nbytes <= 1_000_000
        model(prompts(1, 40)[0], **cache_kwargs(cache))
        assert cache.report().tokens_per_tier["window"] < 250 and cache.nbytes <= 1_000_000


def test_a_fraction_binds_where_it_is_worth_min_tokens():
    model = tiny("qwen2").to(torch.bfloat16)
    ids, _ = prompts(1, 600)
    held = {}
    for least in (0, 64, 128):
        cache = SmartKVCache(model, budget="1/8", policy="keydiff", min_tokens=least)
        with torch.no_grad():
            model(ids, **cache_kwargs(cache))
        held[least] = cache.nbytes
        assert cache.nbytes <= full_bytes(model, max(least, 75))
    assert held[0] <= held[64] < 0.6 * held[128]


@pytest.mark.parametrize("policy", ["auto", "keydiff", "h2o", "full", "snapkv", "tova", "expected_attention"])
@pytest.mark.parametrize("budget", ["60kB", "100kB", "200kB"])
def test_bytes_are_kept_or_refused(budget, policy):
    model = tiny("qwen2").to(torch.bfloat16)
    ids, _ = prompts(1, 800)
    limit = int(budget[:-2]) * 1000
    try:
        cache = SmartKVCache(model, budget=budget, policy=policy)
    except ValueError as error:
        need = int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", ""))
        assert need > limit, error
        cache = SmartKVCache(model, budget=f"{need}B", policy=policy)
        limit = need
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in ids.split([40, 20] + [1] * 110 + [500, 130], 1):
            model(part, **cache_kwargs(cache))
            assert cache.nbytes <= limit, str(cache.report())
            cache.step_kind()  # allocates ahead for a replayed step
            assert cache.nbytes <= limit, str(cache.report())


def test_repeated_rows_and_replayed_steps_keep_a_short_context():
    model = tiny("qwen2").to(torch.bfloat16)
    ids, _ = prompts(1, 60)
    cache = SmartKVCache(model, budget="1/8")
    with torch.no_grad():
        model(ids, **cache_kwargs(cache))
        cache.batch_repeat_interleave(4)
        model(ids[:, :1].expand(4, 1), **cache_kwargs(cache))
    assert cache.report().tokens_per_tier["window"] == 61
    cache = SmartKVCache(model, budget="512MB")
    with torch.no_grad():
        model(ids, **cache_kwargs(cache))
        while cache.step_kind() is None:
            model(ids[:, :1], **cache_kwargs(cache))
    assert cache.nbytes < 3 * full_bytes(model, 60)


def test_what_a_policy_remembers_is_a_small_part():
    model = tiny("qwen2").to(torch.bfloat16)
    ids, _ = prompts(1, 1500)
    for budget in ("1/4", "1/16"):
        cache = SmartKVCache(model, budget=budget, policy="expected_attention")
        with torch.no_grad():
            model(ids, **cache_kwargs(cache))
        one = 4 * 4 * 64 * 2 + 4 * 4 * 4  # bytes of a query, and of its log-sum-exp, in four heads of four layers
        allowed = max(STATE_SHARE * max(cache.report().full_bytes * float(eval(budget)), full_bytes(model, 128)), one)
        assert 0 < cache.report().parts["policy state"] <= allowed + 4 * 4 * 4


def test_full_gives_way_with_a_warning():
    """A fraction that could never hold every token is refused; bytes that no longer do lose the oldest tokens."""
    model = tiny("qwen2").to(torch.bfloat16)
    ids, _ = prompts(1, 900)
    with pytest.raises(ValueError, match=r"budget must be at least 0\.1.. of the full cache for policy 'full'"):
        SmartKVCache(model, budget="1/8", policy="full")
    cache = SmartKVCache(model, budget="200kB", policy="full", tiers=("K4V3",))
    with torch.no_grad(), pytest.warns(UserWarning, match=r"at K4V3 bits the budget no longer holds every token"):
        model(ids, **cache_kwargs(cache))
    assert cache.nbytes <= 200_000 and cache.report().tokens_per_tier["evicted"] > 0
    packed = cache.layers[0].store.positions()
    assert int(packed.max()) > 700 and int(packed[packed >= 0].min()) > 100, "the oldest go"
    cache = SmartKVCache(model, budget=0.9, policy="full")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids[:, :8], **cache_kwargs(cache))
        for token in ids[:, 8:300].split(1, 1):
            model(token, **cache_kwargs(cache))
