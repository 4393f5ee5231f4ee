"""Shares of the layers: the rule, the map that it writes, and the losses of one layer at a time."""

import pytest
import torch
from gates.make_gates import random_gates
from hf.tiny import prompts, tiny

from smartkv_ext.eval.recording import record
from smartkv_ext.gates import ModelFacts
from smartkv_ext.hf import patch
from smartkv_ext.policies import get_policy
from training.layer_shares import EXTREME, layer_losses, mean_profile, policy_map, shares


def test_bytes_go_where_loss_is():
    """With slope 1 and no clamping, bytes go with the root of the loss, and the sum of losses / bytes is least."""
    losses = torch.tensor([1.0, 4.0, 2.25, 0.25])
    found = shares(losses + 0.25, slope=1.0)  # half of the least is the floor
    torch.testing.assert_close(found / found[0], torch.tensor([1.0, 2.0, 1.5, 0.5]))
    best = (losses / found).sum()
    for _ in range(20):
        other = found * (1 + 0.1 * torch.randn(4))
        assert (losses / (other / other.mean())).sum() > best
    clamped = shares(torch.tensor([1.0, 1e6, 1.0, 1.0, 0.0]), slope=1.0)
    assert clamped.mean() == pytest.approx(1) and clamped.max() <= EXTREME * 1.01 and clamped.min() > 0.2


def test_the_map_has_the_shares():
    policy = get_policy("map", **policy_map(torch.tensor([0.5, 1.5, 1.0]), "snapkv"))
    assert [policy.layer_share(i, 3, 2) for i in range(3)] == [0.5, 1.5, 1.0] and policy.compares_heads


def test_losses_are_those_of_one_layer():
    model, ids = tiny("qwen2"), prompts(1, 400)[0]
    with patch(model), torch.no_grad():
        recording = record(model, ids[:, :380])
        none = layer_losses(model, None, recording, ids[:, 380:], budget=None, policy="full", tiers=(16,))
        gate = get_policy("gate", gates=random_gates(ModelFacts.from_config(model.config)))
        for policy in ("random", "h2o", gate):
            some = layer_losses(model, None, recording, ids[:, 380:], budget=0.1, policy=policy)
            assert some.min() > 10 * none.abs().max(), policy
    assert len(none) == 4 and none.abs().max() < 1e-5


def test_a_text_that_loses_more_everywhere_counts_no_more():
    quiet, loud = torch.tensor([1.0, 3.0]), torch.tensor([300.0, 100.0])
    torch.testing.assert_close(mean_profile([quiet, loud]), torch.tensor([0.5, 0.5]))
