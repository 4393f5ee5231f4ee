"""h2o, hybrid, layer_aware, evolved: against loops over single tokens, for new tokens and for packed records."""

import math

import pytest
import torch
from gates.make_gates import random_gates
from policies.views import make_records, make_view, valid

from smartkv_ext.policies import get_policy


def layer_aware(position, length, recent, cumulative, norm, r):
    """The formula of the design, token by token."""
    age = length - 1 - position
    if position < 4:
        return math.inf
    if age < 4:
        return 1e6 - age
    share = (position + 1) / length
    return (
        (0.7 - 0.2 * r) * recent
        + (0.3 + 0.2 * r) * cumulative * share ** (0.25 + 0.1 * r)
        + (0.15 + 0.1 * r) * max(0.0, 1 - age / 128)
        - 0.1 * min(norm, 2.0)
    )


def hybrid(position, length, recent, cumulative, norm, r):
    age = length - 1 - position
    if position < 4:
        return math.inf
    if age < 4:
        return 1e6 - age
    return 0.6 * recent + 0.4 * cumulative * ((position + 1) / length) ** 0.3 + max(0.0, 1 - age / 128)


def h2o(position, length, recent, cumulative, norm, r):
    return cumulative


def by_token(formula, positions, pads, length, recent, cumulative, norms, r):
    """Scores (batch, heads, n) of tokens at logical ``positions`` (batch, heads, n) behind ``pads`` (batch,)."""
    out = torch.full(positions.shape, math.nan)
    for b, h, i in torch.ones_like(out).nonzero().tolist():
        if positions[b, h, i] >= 0:
            place, own = int(positions[b, h, i]) - pads[b], length - pads[b]
            out[b, h, i] = formula(
                place, own, float(recent[b, h, i]), float(cumulative[b, h, i]), float(norms[b, h, i]), r
            )
    return out


@pytest.mark.parametrize(("name", "formula"), [("h2o", h2o), ("hybrid", hybrid), ("layer_aware", layer_aware)])
def test_new_tokens(name, formula):
    view = make_view(n=180)
    positions = view.positions[:, None].expand(-1, 2, -1)
    norms = view.keys.square().sum(-1).sqrt()
    expected = by_token(formula, positions, [0, 5], 180, view.recent, view.received, norms, 0.25)
    torch.testing.assert_close(get_policy(name).score(view)[valid(view)], expected[valid(view)])


@pytest.mark.parametrize(("name", "formula"), [("h2o", h2o), ("hybrid", hybrid), ("layer_aware", layer_aware)])
def test_packed_records(name, formula):
    records = make_records(n=80, seen=200)
    held = records.positions >= 5  # a row has no records at its padding
    expected = by_token(
        formula, records.positions, [0, 5], 200, records.recent, records.received, records.key_norms(), 0.5
    )
    policy = get_policy(name)
    torch.testing.assert_close(policy.refresh(records)[held], expected[held])
    assert torch.equal(policy.carried(records.stored, records.received, 0, 0), records.received)


def test_layer_aware_is_an_expression():
    text = (
        "(0.7 - 0.2 * layer) * recent"
        " + (0.3 + 0.2 * layer) * cumulative * ((position + 1) / seq_len) ** (0.25 + 0.1 * layer)"
        " + (0.15 + 0.1 * layer) * max(0, 1 - age / 128) - 0.1 * min(key_norm, 2)"
    )
    view = make_view(n=180)
    expected = get_policy("layer_aware").score(view)
    torch.testing.assert_close(get_policy("evolved", expression=text).score(view)[valid(view)], expected[valid(view)])


@pytest.mark.parametrize("term", ["layer_term", "position_term", "recency_term", "norm_term"])
def test_every_term_of_layer_aware_matters(term):
    view = make_view(n=180)
    without = get_policy("layer_aware", **{term: False}).score(view)
    assert not torch.allclose(without[valid(view)], get_policy("layer_aware").score(view)[valid(view)])


def test_evolved_asks_only_for_what_it_uses():
    assert get_policy("evolved", expression="cumulative").recent_queries == 0
    assert get_policy("evolved", expression="cumulative + recent").recent_queries == 32
    assert not get_policy("evolved", expression="cumulative").scores_keys
    assert get_policy("evolved", expression="gate + recent").scores_keys
    with pytest.raises(ValueError, match="expression uses 'colour'; features are position, age"):
        get_policy("evolved", expression="colour + 1")
    with pytest.raises(ValueError, match="may use gate or cumulative"):
        get_policy("evolved", expression="min(gate, 2) + cumulative")
    with pytest.raises(ValueError, match="gates serve the feature gate"):
        get_policy("evolved", expression="cumulative", gates=random_gates())


def test_the_gate_is_a_feature_of_new_tokens_and_of_records():
    policy = get_policy("evolved", expression="recent * exp(gate / 2) - age / 100", gates=random_gates())
    view = make_view(n=180)
    age = 179 - view.positions[:, None].float()
    inside = valid(view) & (age >= 4) & (age <= 170)  # neither sinks nor newest
    expected = view.recent * (view.key_scores / 2).exp() - age / 100
    torch.testing.assert_close(policy.score(view)[inside], expected[inside])
    assert policy.carried(policy.score(view), view.received, 0, 0, view.key_scores) is view.key_scores
    records = make_records()
    age = 59 - records.positions.float()
    expected = records.recent * (records.stored / 2).exp() - age / 100
    inside = (records.positions >= 9) & (age >= 4)
    assert inside.sum() > 50
    torch.testing.assert_close(policy.refresh(records)[inside], expected[inside])
