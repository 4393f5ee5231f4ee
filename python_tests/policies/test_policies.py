"""Every policy against an independent dense computation, with padding that holds NaN."""

import json
import re
from dataclasses import replace

import pytest
import torch
from policies.views import attention, make_records, make_view, valid

from smartkv_ext.policies import POLICIES, Policy, get_policy

NEEDED = {"map": {"default": "keydiff"}}  # options without which a policy is refused


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_shape_dtype_and_no_contamination(name):
    """Tokens that are not there, NaN and all, change nothing for those that are."""
    view = make_view()
    policy = get_policy(name, **NEEDED.get(name, {}))
    scores = policy.score(view)
    assert scores.shape == view.keys.shape[:3] and scores.dtype == torch.float32
    assert not scores[valid(view)].isnan().any() and (scores[valid(view)] > -torch.inf).all()
    clean = make_view()
    clean.keys[1, :, :5] = 7.0
    assert torch.equal(policy.score(clean)[valid(view)], scores[valid(view)])
    assert policy.name == name and policy.summary and policy.source


def test_knorm():
    view = make_view()
    expected = -view.keys.square().sum(-1).sqrt()
    assert torch.allclose(get_policy("knorm").score(view)[valid(view)], expected[valid(view)], atol=1e-6)


def test_keydiff_is_the_papers_score_and_goes_on_while_decoding():
    view = make_view()
    unit = view.keys / view.keys.norm(dim=-1, keepdim=True)
    unit = torch.where(valid(view)[..., None], unit, 0.0)
    expected = -torch.nn.functional.cosine_similarity(unit, unit.sum(2, keepdim=True), dim=-1)
    policy = get_policy("keydiff")
    assert torch.allclose(policy.score(view)[valid(view)], expected[valid(view)], atol=1e-5)
    # Later: the window is shown again, with new tokens. The anchor must count each token once.
    later = make_view(seed=1, start=30, state=view.state)
    later.positions[1, :5] = torch.arange(30, 35)
    later.keys[:, :, :10] = view.keys[:, :, 30:]
    policy.score(later)
    new = later.keys[:, :, 10:] / later.keys[:, :, 10:].norm(dim=-1, keepdim=True)
    assert torch.allclose(view.state["keydiff_anchor"], unit.sum(2) + new.sum(2), atol=1e-4)


def test_snapkv():
    view = make_view()
    mass = attention(view, 32).unflatten(1, (2, 3)).sum((2, 3)) / 32
    expected = torch.nn.functional.max_pool1d(mass, 5, 1, 2)
    assert torch.allclose(get_policy("snapkv").score(view)[valid(view)], expected[valid(view)], atol=1e-6)
    records = make_records(stored=torch.tensor([1.0, 0.1]), mass=torch.tensor([8.0, 8.0]), num_queries=16)
    assert torch.allclose(get_policy("snapkv").refresh(records), torch.tensor([0.9, 0.5]))


@pytest.mark.parametrize("layers", [1, 2, 12, 30])
def test_pyramidkv_is_snapkv_with_an_arithmetic_sequence_of_budgets(layers):
    policy = get_policy("pyramidkv", beta=20)
    shares = torch.tensor([policy.layer_share(i, layers, 8) for i in range(layers)])
    assert torch.isclose(shares.mean(), torch.tensor(1.0))
    if layers > 1:
        assert torch.allclose(shares[-1], torch.tensor(1 / 20)) and torch.allclose(shares.diff(), shares.diff()[:1])
    assert torch.equal(policy.score(make_view())[0], get_policy("snapkv").score(make_view())[0])
    with pytest.raises(ValueError, match=r"beta must be at least 1; got 0\.5"):
        get_policy("pyramidkv", beta=0.5)


def test_tova_uses_the_last_query_and_the_mean_of_all_heads():
    view = make_view()
    expected = attention(view, 1).sum((1, 2)) / 2  # two KV heads
    scores = get_policy("tova").score(view)
    assert torch.allclose(scores[:, 0][valid(view)[:, 0]], expected[valid(view)[:, 0]], atol=1e-6)
    assert torch.equal(scores[:, 0], scores[:, 1])


@pytest.mark.parametrize("name", ["full", "sliding_window", "streaming_llm"])
def test_recency_policies_prefer_newer_tokens(name):
    scores = get_policy(name).score(make_view())[0, 0]
    assert (scores.diff() > 0).all()


def test_streaming_heads_forget_all_but_the_newest():
    policy = get_policy("streaming_llm", recent=12)
    scores = policy.score(make_view())[0, 0]
    assert torch.equal(scores > -torch.inf, torch.arange(40) >= 28)
    records = make_records(seen=60)
    assert torch.equal(policy.refresh(records) > -torch.inf, records.positions >= 48)
    with pytest.raises(ValueError, match="recent must be at least 1"):
        get_policy("streaming_llm", recent=0)


def test_random_depends_on_seed_layer_head_and_position_alone():
    view = make_view()
    policy = get_policy("random")
    scores = policy.score(view)
    tail = replace(view, keys=view.keys[:, :, 20:], positions=view.positions[:, 20:])
    assert torch.equal(policy.score(tail), scores[:, :, 20:]), "grouping must not matter"
    shard = replace(view, keys=view.keys[:, 1:], head_offset=1)
    assert torch.equal(policy.score(shard), scores[:, 1:]), "sharding must not matter"
    assert not torch.equal(scores[:, 0], scores[:, 1])
    assert not torch.equal(policy.score(replace(view, layer_idx=2)), scores)
    assert not torch.equal(get_policy("random", seed=1).score(view), scores)
    long = replace(view, keys=torch.zeros(1, 8, 4000, 64), positions=torch.arange(4000, dtype=torch.int32)[None])
    values = policy.score(long)
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(values[0])[0, 1]) < 0.05


def test_registry():
    assert isinstance(get_policy("snapkv", kernel_size=7), Policy)
    policy = get_policy("knorm")
    assert get_policy(policy) is policy
    with pytest.raises(
        ValueError, match="policy must be one of adakv, auto, evolved, expected_attention, full, gate, gate_hybrid,"
    ):
        get_policy("magic")
    with pytest.raises(TypeError, match="policy must be a name or a Policy; got int"):
        get_policy(3)
    with pytest.raises(ValueError, match='policy "map" must say what it maps: name its file'):
        get_policy("map")
    with pytest.raises(ValueError, match="a policy must be a name or"):
        get_policy({"policy": "knorm"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "knorm", "bananas": 1}, "policy 'knorm' has no option 'bananas'; its options: none"),
        (
            {"name": "snapkv", "kernel": 5},
            "policy 'snapkv' has no option 'kernel'; its options: kernel_size: int, decay: number",
        ),
        (
            {"name": "gate", "recency": "1"},
            "option 'recency' of policy 'gate' must be number; got '1' (str); its options: gates: str or Gates or None",
        ),
        ({"name": "streaming_llm", "recent": True}, "'recent' of policy 'streaming_llm' must be int or None; got True"),
        ({"name": "union", "parts": 3}, "option 'parts' of policy 'union' must be list; got 3 (int)"),
        ({"name": "adakv", "base": {"name": "snapkv", "decay": None}}, "option 'decay' of policy 'snapkv' must be"),
        ({"name": "auto", "gates": 1}, "option 'gates' of policy 'auto' must be str or bool or None; got 1 (int)"),
    ],
)
def test_options_are_refused_by_name(spec, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        get_policy(spec)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_specification_is_plain_json_and_gives_the_same_policy(name):
    policy = get_policy(name, **NEEDED.get(name, {}))
    assert get_policy(json.loads(json.dumps(policy.spec()))) == policy
