"""Measured attention: what policies are told equals sums over a dense model's whole attention matrix."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hf.tiny import prompts, tiny

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies.features import FeaturePolicy


@dataclass(frozen=True)
class Spy(FeaturePolicy):
    """Keeps everything, and remembers what it was told in one layer."""

    name: ClassVar[str] = "spy"
    recent_queries: ClassVar[int] = 32
    layer: int = 2
    told: list = field(default_factory=list, compare=False)

    def score_features(self, features):
        return features.cumulative

    def score(self, view):
        if view.layer_idx == self.layer:
            positions = view.positions[:, None].expand_as(view.received)
            self.told.append((view.seen, positions.clone(), view.received.clone(), view.recent.clone()))
        return super().score(view)

    def refresh(self, records):
        if records.layer_idx == self.layer:
            self.told.append((records.seen, records.positions, records.received, records.recent))
        return super().refresh(records)


def dense_sums(model, ids, mask, layer):
    """Attention (batch, num_kv_heads, queries, tokens) of a layer, summed over the query group."""
    model.set_attn_implementation("eager")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions[layer]
    model.set_attn_implementation("sdpa")
    out = out * mask[:, None, :, None]
    return out.unflatten(1, (2, -1)).sum(2)


def run(model, ids, mask, chunks, policy, **kwargs):
    """Feed ``ids`` in chunks of the given sizes."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=None, policy=policy, tiers=(16,), **kwargs, min_tokens=0)
        begin = 0
        for size in chunks:
            end = begin + size
            model(
                ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                **cache_kwargs(cache),
            )  # fmt: skip
            begin = end
    return cache


@pytest.mark.parametrize("chunks", [[200] + [1] * 100, [90, 110] + [1] * 100, [1] * 220, [150, 50, 7, 93]])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_sums_equal_the_dense_matrix(kind, chunks):
    """At prefill, in chunks and token by token; with left padding; in the window and in packed records."""
    model, policy = tiny(kind), Spy()
    ids, mask = prompts(2, sum(chunks))
    mask[1, :40] = 0
    mask[1, 40:] = 1
    run(model, ids, mask, chunks, policy, window=64)
    dense = dense_sums(model, ids, mask, policy.layer)
    assert len(policy.told) > 1
    for seen, positions, received, recent in policy.told:
        held = positions >= 0
        place = positions.clamp(min=0).long()
        total = dense[:, :, :seen].sum(2).gather(2, place)
        newest = dense[:, :, seen - 32 : seen].sum(2).gather(2, place)
        # Records carry a bfloat16: 8 bits, rounded once at every packing.
        torch.testing.assert_close(received[held], total[held], rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(recent[held], newest[held], rtol=1e-3, atol=1e-4)


def test_sums_follow_beams_and_crops():
    model, policy = tiny("qwen2"), Spy()
    ids, mask = prompts(2, 200)
    mask[:] = 1
    cache = run(model, ids, mask, [150] + [1] * 20, policy, window=64)
    dense = dense_sums(model, ids, mask, policy.layer)

    def check(rows, seen, length):
        layer = cache.layers[policy.layer]
        positions, received = layer.store.positions().flatten(2), layer.received_by_records().flatten(2)
        positions = torch.cat([positions, layer.window.held_positions()[:, None].expand(-1, 2, -1)], 2)
        received = torch.cat([received, layer.window.held("received")[..., 0]], 2)
        held = positions >= 0
        assert int(held.sum()) == len(rows) * 2 * length
        total = dense[rows, :, :seen].sum(2).gather(2, positions.clamp(min=0).long())
        torch.testing.assert_close(received[held], total[held], rtol=2e-2, atol=1e-3)

    check([0, 1], 170, 170)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    check([1, 1, 0], 170, 170)
    cache.crop(-70)  # what the removed queries paid stays counted
    check([1, 1, 0], 170, 100)
