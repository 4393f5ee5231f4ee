"""Traces of a model: what attention saw, and the split of its heads."""

import pytest
import torch
from hf.tiny import prompts, tiny

from smartkv_ext.policies import get_policy
from training.split_heads import policy_map, retrieval_scores
from training.traces import collect


def test_traces_equal_the_models_own_attention():
    model = tiny("qwen3")
    ids, _ = prompts(1, 120)
    traces = collect(model, ids, tokens=90)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = model(ids, output_attentions=True).attentions
    for trace, whole in zip(traces, dense, strict=True):
        whole = whole.unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(trace.view.received, whole[:, :, :90, :90].sum(2), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(trace.view.recent, whole[:, :, 58:90, :90].sum(2), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(trace.future, whole[:, :, 90:, :90].sum(2), rtol=1e-3, atol=1e-5)
        assert trace.view.queries.shape == (1, 4, 90, 64) and trace.view.inv_freq.shape == (32,)
    scores = retrieval_scores(traces, recent=16)
    far = dense[2].unflatten(1, (2, 2)).sum(2)[0, 1, 90:, :90]
    torch.testing.assert_close(scores[2, 1], far[:, 4:74].sum() / far.sum(), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="recent must be below 86"):
        retrieval_scores(traces, recent=86)


def test_the_best_heads_retrieve_and_the_others_stream():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    policy = get_policy("map", **policy_map(scores, 0.5, 64, "snapkv"))
    policy.check(3, 2)
    names = [[policy.policy_of(layer, head).name for head in range(2)] for layer in range(3)]
    assert names == [["snapkv", "streaming_llm"], ["streaming_llm"] * 2, ["snapkv"] * 2]
    assert [policy.layer_share(i, 3, 2) for i in range(3)] == [1, 0, 2] and policy.compares_heads
