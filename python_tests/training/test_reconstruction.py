"""The metric and the synthetic patterns: against brute force, and against what they promise."""

from dataclasses import replace

import pytest
import torch

from smartkv_ext.policies import POLICIES, get_policy
from training.reconstruction import error_curve, layer_counts, reconstruction_errors
from training.synthetic import SPLITS, Pattern, digest, generate_traces, generate_vectors

SMALL = Pattern(documents=2, layers=3, tokens=160, future=48)


@pytest.fixture(scope="module")
def traces():
    return generate_traces("train", SMALL)


def whole_attention(split, layer, pattern):
    """(documents, heads, queries, tokens) by the textbook."""
    q, k, _ = generate_vectors(split, layer, pattern)
    scores = q @ k.repeat_interleave(pattern.kv_groups, 1).transpose(2, 3) / 8
    mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def test_error_curve_equals_brute_force():
    torch.manual_seed(1)
    scores, future = torch.randn(3, 12).round(decimals=1), torch.rand(3, 12)
    scores[0, 3] = scores[0, 7] = 0.5
    scores[1, 2], scores[2, 5] = -torch.inf, torch.inf
    curve = error_curve(scores, future)
    for row in range(3):
        order = sorted(range(12), key=lambda i: (-scores[row, i].item(), -i))
        for keep in range(13):
            kept = [i for i in order[:keep] if scores[row, i] > -torch.inf]
            lost = 1 - future[row, kept].sum() / future[row].sum()
            assert curve[row, keep].item() == pytest.approx(lost.item(), abs=1e-6)


def test_traces_equal_sums_over_the_dense_matrix(traces):
    for layer, trace in enumerate(traces):
        dense = whole_attention("train", layer, SMALL).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(trace.view.received, dense[:, :, :160, :160].sum(2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trace.view.recent, dense[:, :, 128:160, :160].sum(2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trace.future, dense[:, :, 160:, :160].sum(2), rtol=1e-4, atol=1e-5)


def test_the_future_itself_is_the_best_score_and_chance_loses_its_share(traces):
    class Oracle(type(get_policy("knorm"))):
        def score(self, view):
            return next(t.future for t in traces if t.view is view)

    best = reconstruction_errors(Oracle(), traces, window=0)
    for name in sorted(set(POLICIES) - {"full", "map", "gate", "gate_hybrid"}):
        errors = reconstruction_errors(get_policy(name), traces, window=4)
        assert all(e >= b - 1e-6 for e, b in zip(errors, best, strict=True)), name
        assert errors == sorted(errors, reverse=True), name
    flat = [replace(t, future=torch.ones_like(t.future)) for t in traces]
    errors = reconstruction_errors(get_policy("random"), flat, window=0)
    assert errors == pytest.approx([0.75, 0.5, 0.25], abs=1e-6)
    assert reconstruction_errors(get_policy("snapkv"), flat, shared=True) == pytest.approx([0.75, 0.5, 0.25], abs=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_score_that_is_no_number_is_worth_as_little_as_one_of_minus_infinity(traces, shared):
    class Broken(type(get_policy("knorm"))):
        bad = torch.nan

        def score(self, view):
            return torch.where(view.positions[:, None] % 3 == 0, self.bad, super().score(view))

    class Never(Broken):
        bad = -torch.inf

    errors = [reconstruction_errors(policy, traces, window=4, shared=shared) for policy in (Broken(), Never())]
    assert errors[0] == pytest.approx(errors[1], abs=1e-6) and errors[0][2] > 0.1


def test_layers_share_what_a_layer_cannot_use(traces):
    counts = layer_counts(get_policy("pyramidkv"), traces, 0.75)
    assert sum(counts) == pytest.approx(0.75 * 3 * 160, rel=1e-6)
    assert counts[0] == counts[1] == 160 and counts[2] == pytest.approx(40)
    assert layer_counts(get_policy("h2o"), traces, 0.25) == pytest.approx([40] * 3)
    streaming = {"layers": 1, "policy": {"name": "streaming_llm", "recent": 8}, "share": 0}
    split = get_policy("map", default="snapkv", rules=[streaming])
    assert layer_counts(split, traces, 0.25, least=12) == pytest.approx([54, 12, 54], rel=1e-6)
    errors = reconstruction_errors(split, traces, window=8)  # sinks and window stay, whatever the share
    assert 0 < errors[2] < errors[0] < 0.8


def test_patterns_are_bit_identical_and_splits_differ():
    assert len({digest(split, SMALL) for split in SPLITS}) == 3
    assert digest("train", SMALL) == digest("train", SMALL)
    torch.manual_seed(99)
    torch.rand(7)  # nothing outside may leak in
    again = generate_vectors("valid", 2, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again, generate_vectors("valid", 2, SMALL), strict=True))


def test_patterns_have_what_they_promise():
    pattern = Pattern(documents=4, layers=4, tokens=384, future=128)
    peaks = []
    for layer in range(4):
        keys = generate_vectors("train", layer, pattern)[1]
        attention = whole_attention("train", layer, pattern)[:, :, 384:, :384].mean((1, 2))
        entropy = -(attention / attention.sum(-1, keepdim=True)).clamp(min=1e-12).log().mul(attention).sum(-1)
        peaks.append(entropy.mean().item())
        if layer:
            continue
        mean = attention.mean(0)
        assert mean[:4].min() > 5 * mean[4:].mean(), "sinks"
        assert mean[-32:].mean() > 2 * mean[128:256].mean(), "recency"
        noise = attention[:, 100:300]
        dense = keys[:, 0, 100:300, 5] > keys[:, 0, 100:300, 5].median() + 0.25
        assert 0.06 < dense.float().mean() < 0.14
        assert 2.2 < noise[dense].mean() / noise[~dense].mean() < 4, "three times the attention, at focus 1"
    assert peaks == sorted(peaks, reverse=True), "later layers are more peaked"
