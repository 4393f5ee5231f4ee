"""union: places in the parts' orders."""

import pytest
import torch

from python_tests.gates.make_gates import random_gates
from python_tests.hf.tiny import prompts, tiny
from python_tests.policies.views import make_view, valid
from smartkv_ext import SmartKVCache, patch
from smartkv_ext.gates import ModelFacts
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import get_policy


def test_the_best_of_each_part_come_first():
    view = make_view(rope=True)
    union = get_policy("union").score(view).masked_fill(~valid(view), -torch.inf)
    for name in ("keydiff", "expected_attention"):
        scores = get_policy(name).score(make_view(rope=True)).masked_fill(~valid(view), -torch.inf)
        for row in range(2):
            top = scores[row].flatten().argsort(descending=True)[:6]
            place = union[row].flatten().argsort(descending=True).argsort()[top]
            assert (place < 12).all(), "6 of each fill 12 places, or fewer where both want a token"


def test_a_part_whose_heads_do_not_compare_counts_in_its_head():
    policy = get_policy("union", parts=("streaming_llm", "knorm"), weights=(1, 1e-6))
    view = make_view()
    scores = policy.score(view)
    newest = valid(view).flip(-1).float().argmax(-1)
    last = (scores.shape[2] - 1 - newest)[..., None]
    assert scores.gather(-1, last).eq(0).all(), "the newest has place 0 in every head"
    assert scores.eq(0).sum() == 4 + 4, "and the smallest key of every head"


def test_weights_share_the_places():
    heavy = get_policy("union", weights=(100, 1)).score(make_view(rope=True))
    alone = get_policy("keydiff").score(make_view(rope=True))
    where = valid(make_view())[0]
    top = alone[0].masked_fill(~where, -torch.inf).flatten().argsort(descending=True)[:20]
    place = heavy[0].masked_fill(~where, -torch.inf).flatten().argsort(descending=True).argsort()[top]
    assert (place < 25).all()


def test_in_a_cache_and_as_a_specification():
    model = tiny("qwen2")
    policy = get_policy(get_policy("union", parts=("keydiff", "snapkv")).spec())
    assert policy.prefill_queries == 32 and policy.decode_queries == 8
    ids, _ = prompts(1, 400)
    with torch.no_grad(), patch(model):
        cache = SmartKVCache(model.config, budget=0.25, policy=policy, window=32, min_tokens=0)
        model(ids[:, :300], **cache_kwargs(cache))
        for i in range(300, 400):
            model(ids[:, i : i + 1], **cache_kwargs(cache))
    assert cache.report().ratio <= 0.25


def kept_by_head(positions):
    """positions (num_kv_heads, tiers, slots) -> {(head, position)}."""
    return {(head, int(p)) for head, row in enumerate(positions) for p in row[row >= 0]}


def test_a_part_with_gates():
    """A gate that outweighs the other part decides almost alone: only that part's very best token comes first."""
    model = tiny("qwen2")
    gate = get_policy("gate", gates=random_gates(ModelFacts.from_config(model.config)), recency=0.0)
    ids, _ = prompts(1, 300)
    kept = []
    with torch.no_grad(), patch(model):
        for policy in (gate, get_policy("union", parts=(gate, "keydiff"), weights=(1e6, 1))):
            cache = SmartKVCache(model.config, budget=0.25, policy=policy, window=32, min_tokens=0)
            model(ids, **cache_kwargs(cache))
            kept.append([kept_by_head(layer.store.positions()[0]) for layer in cache.layers])
    for alone, outweighed in zip(*kept, strict=True):
        assert len(alone) > 50 and len(alone & outweighed) > 0.9 * len(alone)
    with pytest.raises(ValueError, match="one policy with gates"):
        get_policy("union", parts=(gate, gate))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"parts": ("keydiff",)}, "at least two"),
        ({"parts": ("keydiff", "full")}, "got 'full'"),
        ({"parts": ("keydiff", "h2o")}, "got 'h2o'"),
        ({"weights": (1,)}, "2 positive numbers"),
        ({"weights": (1, 0)}, "2 positive numbers"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        get_policy("union", **options)
