"""Every policy against an independent dense computation, with padding that holds NaN."""

from dataclasses import replace

import pytest
import torch

from smartkv_ext.policies import POLICIES, Policy, TokenView, get_policy


def make_view(n=40, q_len=32, batch=2, heads=2, groups=3, seed=0, state=None, start=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, n, 64, generator=generator)
    positions = torch.arange(start, start + n, dtype=torch.int32).repeat(batch, 1)
    positions[1, :5] = -1
    keys[1, :, :5] = torch.nan
    return TokenView(
        layer_idx=1, num_layers=4, keys=keys, values=torch.randn(batch, heads, n, 64, generator=generator),
        pre_rope_keys=None, positions=positions,
        queries=torch.randn(batch, heads * groups, q_len, 64, generator=generator) if q_len else None,
        lse=None, q_start=start + n - q_len, softmax_scale=0.125, sliding_window=0, head_offset=0,
        state={} if state is None else state,
    )  # fmt: skip


def valid(view):
    return (view.positions >= 0)[:, None].expand(view.keys.shape[:3])


def attention(view, queries):
    """(batch, num_heads, q, n) probabilities of the newest queries, by the textbook."""
    q = view.queries[:, :, -queries:]
    groups = q.shape[1] // view.keys.shape[1]
    keys = torch.nan_to_num(view.keys).repeat_interleave(groups, 1)
    scores = q @ keys.transpose(2, 3) * view.softmax_scale
    where = torch.arange(view.q_start + view.queries.shape[2] - queries, view.q_start + view.queries.shape[2])
    allowed = (view.positions[:, None, None] >= 0) & (view.positions[:, None, None] <= where[:, None])
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_shape_dtype_and_no_contamination(name):
    """Tokens that are not there, NaN and all, change nothing for those that are."""
    view = make_view()
    policy = get_policy(name)
    scores = policy.score(view)
    assert scores.shape == view.keys.shape[:3] and scores.dtype == torch.float32
    assert torch.isfinite(scores[valid(view)]).all()
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
    old, seen = torch.tensor([1.0, 0.1]), torch.tensor([8.0, 8.0])
    assert torch.allclose(get_policy("snapkv").refresh(old, seen, 16), torch.tensor([0.9, 0.5]))


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
    with pytest.raises(ValueError, match="policy must be one of full, keydiff, knorm, random"):
        get_policy("magic")
    with pytest.raises(TypeError, match="policy must be a name or a Policy; got int"):
        get_policy(3)
    with pytest.raises(TypeError):
        get_policy("knorm", bananas=1)
