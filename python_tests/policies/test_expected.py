"""expected_attention: against samples of future queries, and against the paper's formula written out."""

import pytest
import torch
from policies.views import make_view, valid

from smartkv_ext.policies import get_policy


def rotation(angles):
    """(..., 64, 64) matrix that turns channel pairs (i, i + 32) by ``angles`` (..., 32)."""
    out = torch.zeros(*angles.shape[:-1], 64, 64)
    i = torch.arange(32)
    out[..., i, i] = out[..., i + 32, i + 32] = angles.cos()
    out[..., i, i + 32] = -angles.sin()
    out[..., i + 32, i] = angles.sin()
    return out


def dense(view, row, n_future, epsilon):
    """Scores (heads, n) of one row, with whole rotation matrices and torch's own covariance."""
    tokens = int(row and 5)
    own = view.positions[row] >= 0
    places = torch.arange(view.q_start, view.seen)
    used = places >= tokens + 4
    back = rotation(-places[used, None] * view.inv_freq)
    average = rotation((view.seen + torch.arange(n_future))[:, None] * view.inv_freq).mean(0)
    out = torch.zeros(2, view.keys.shape[2])
    for head in range(6):
        queries = torch.einsum("nij,nj->ni", back, view.queries[row, head, used])
        mu = average @ queries.mean(0)
        sigma = average @ torch.cov(queries.T, correction=0) @ average.T
        k = view.keys[row, head // 3, own]
        logits = k @ mu / 8 + torch.einsum("ni,ij,nj->n", k, sigma, k) / 128
        out[head // 3, own] += logits.softmax(0) / 3
    return (out + epsilon) * view.values[row].norm(dim=-1)


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_equals_the_formula(epsilon):
    view = make_view(n=60, q_len=60, rope=True)
    scores = get_policy("expected_attention", n_future=100, epsilon=epsilon).score(view)
    expected = torch.stack([dense(view, row, 100, epsilon) for row in range(2)])
    torch.testing.assert_close(scores[valid(view)], expected[valid(view)], rtol=1e-3, atol=1e-6)


def test_predicts_the_attention_of_queries_like_those_seen():
    """Queries drawn around a mean: the tokens that future queries attend to are those of the highest score."""
    generator = torch.Generator().manual_seed(0)
    view = make_view(n=300, q_len=200, rope=True)
    taste = torch.randn(6, 1, 64, generator=generator) * 2
    places = torch.arange(100, 428)
    queries = taste + torch.randn(2, 6, len(places), 64, generator=generator)
    turned = torch.einsum("nij,bhnj->bhni", rotation(places[:, None] * view.inv_freq), queries)
    view.queries = turned[:, :, :200]
    scores = get_policy("expected_attention", n_future=128).score(view) / view.values.norm(dim=-1)
    future = turned[0, :, 200:] @ view.keys[0].repeat_interleave(3, 0).transpose(1, 2) / 8
    actual = future.softmax(-1).unflatten(0, (2, 3)).mean((1, 2))
    assert torch.corrcoef(torch.stack([scores[0, 0], actual[0]]))[0, 1] > 0.8


def test_later_tokens_are_scored_on_the_first_scale():
    view = make_view(n=60, q_len=60, rope=True)
    policy = get_policy("expected_attention")
    first = policy.score(view)
    again = policy.score(view)  # the same tokens shown again weigh the same: the sum over tokens is not taken anew
    torch.testing.assert_close(first[valid(view)], again[valid(view)])
    tail = make_view(n=60, q_len=60, rope=True, state=view.state)
    tail.keys, tail.values, tail.positions = (x[..., 40:, :] if x.dim() > 2 else x[:, 40:] for x in (
        tail.keys, tail.values, tail.positions))  # fmt: skip
    torch.testing.assert_close(policy.score(tail), first[:, :, 40:])
