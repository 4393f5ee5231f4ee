"""With eviction and low bits: equal to a dense masked model, and to attention over the dequantised records."""

import copy

import pytest
import torch
from gates.make_gates import usable
from hf.tiny import KINDS, generate, prompts, tiny
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import POLICIES

# Remembered queries count: with 150 tokens they are a large part of a small budget.
BUDGETS = {"full": None} | dict.fromkeys(("snapkv", "pyramidkv", "adakv", "expected_attention", "union", "auto"), 1.0)


def padding_mask(*args, attention_mask=None, kv_length=None, **kwargs):
    """The 2D padding mask as it is."""
    if attention_mask is None:
        return None
    return torch.nn.functional.pad(attention_mask.bool(), (0, kv_length - attention_mask.shape[1]), value=True)


class Recorder:
    """What every layer held before every forward: positions, and the values that attention should see."""

    def __init__(self, cache, values=False):
        self.cache, self.values, self.steps = cache, values, []

    def __call__(self, module, args, kwargs):
        self.steps.append([self._layer(layer) for layer in self.cache.layers])

    def _layer(self, layer):
        if not layer.is_initialized or layer.seen == 0:
            return None
        heads = layer.window.shape[1]
        window = layer.window.held_positions()[:, None].expand(-1, heads, -1)
        k, v, packed = layer.store.dequantize()
        positions = torch.cat([window, packed], 2)
        if not self.values:
            return positions.clone()
        k = torch.cat([layer.window.held("k").float(), k], 2)
        v = torch.cat([layer.window.held("v").float(), v], 2)
        return positions.clone(), k.clone(), v.clone()


class Replay:
    """Dense attention of the recorded run, step by step and layer by layer."""

    def __init__(self, recorder):
        self.recorder, self.calls = recorder, {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        step = self.calls.get(module.layer_idx, 0)
        self.calls[module.layer_idx] = step + 1
        held = self.recorder.steps[step][module.layer_idx]
        batch, heads, q_len, _ = query.shape
        kv_len, kv_heads = key.shape[2], key.shape[1]
        q = torch.arange(kv_len - q_len, kv_len)[:, None]
        if self.recorder.values and held is not None:
            position = torch.cat([held[0], torch.arange(kv_len - q_len, kv_len).expand(batch, kv_heads, -1)], 2)
            key = torch.cat([held[1], key[:, :, -q_len:]], 2)
            value = torch.cat([held[2], value[:, :, -q_len:]], 2)
            allowed = (position[:, :, None] >= 0) & (position[:, :, None] <= q)
        else:
            position = torch.arange(kv_len).expand(batch, kv_heads, -1)
            alive = torch.zeros(batch, kv_heads, kv_len + 1, dtype=torch.bool)
            if held is not None:
                alive.scatter_(2, torch.where(held < 0, kv_len, held).long(), True)
            alive[..., kv_len - q_len :] = True
            allowed = alive[:, :, None, :kv_len] & (position[:, :, None] <= q)
            if attention_mask is not None:
                allowed = allowed & attention_mask[:, None, None, -kv_len:]
        if sliding_window:
            allowed = allowed & (position[:, :, None] > q - sliding_window)
        groups = heads // kv_heads
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        scores = scores.masked_fill(~allowed.repeat_interleave(groups, 1), -torch.inf)
        value = torch.where(allowed.any(2)[..., None], value, 0.0)
        out = scores.softmax(-1).nan_to_num(0.0) @ value.repeat_interleave(groups, 1)
        return out.transpose(1, 2).contiguous(), None


def compressed_run(model, ids, mask, new=70, values=False, **kwargs):
    with smartkv_ext.patch(model):
        # Rounded queries would change the tokens where two logits are all but equal.
        cache = SmartKVCache(model.config, **(dict(window=24, sinks=4, precision="fp32") | kwargs), min_tokens=0)
        recorder = Recorder(cache, values)
        hook = model.register_forward_pre_hook(recorder, with_kwargs=True)
        out = generate(model, ids, mask, cache, new=new)
        hook.remove()
    return out, cache, recorder


class Force(LogitsProcessor):
    """The tokens of another run: where two logits are all but equal, rounding would choose."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        chosen = self.sequences[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def assert_replay_equal(model, ids, mask, out, recorder, atol=1e-4):
    AttentionInterface.register("replay", Replay(recorder))
    AttentionMaskInterface.register("replay", padding_mask)
    model.set_attn_implementation("replay")
    forced = LogitsProcessorList([Force(out.sequences)])
    # A DynamicCache without a config keeps all, window or not.
    reference = generate(model, ids, mask, DynamicCache(), new=len(out.logits), logits_processor=forced)
    model.set_attn_implementation("sdpa")
    worst = max((a - b).abs().max().item() for a, b in zip(reference.logits, out.logits, strict=True))
    assert worst < atol, worst


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_eviction_equals_dense_masked(kind, batch):
    model = tiny(kind)
    ids, mask = prompts(batch)
    out, cache, recorder = compressed_run(model, ids, mask, budget=1.0, policy="random", tiers=(16,))
    evicted = cache.report().tokens_per_tier["evicted"]
    assert evicted > 20, "float32 pages at a bf16 budget must evict"
    assert_replay_equal(model, ids, mask, out, recorder)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"map"}))
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_hybrid"])
def test_quantised_equals_dequantised_oracle(kind, policy):
    model = tiny(kind)
    ids, mask = prompts(3)
    budget = BUDGETS.get(policy, 0.6)
    out, cache, recorder = compressed_run(
        model, ids, mask, values=True, budget=budget, policy=usable(policy, model), tiers=(2, 3, 4, 8)
    )
    assert sum(cache.report().tokens_per_tier[t] for t in ("2", "3", "4", "8")) > 10
    assert_replay_equal(model, ids, mask, out, recorder, atol=5e-4)


@pytest.mark.parametrize("scope", ["head", "layer", "global"])
def test_scopes(scope):
    model = tiny("qwen2")
    ids, mask = prompts(2, 400)
    out, cache, recorder = compressed_run(
        model, ids, mask, values=True, budget=0.4, policy="random", tiers=(4, 8), scope=scope
    )
    assert cache.report().tokens_per_tier["evicted"] > 20 < cache.report().tokens_per_tier["4"]
    assert_replay_equal(model, ids, mask, out, recorder, atol=5e-4)
    kept = [layer.store.positions().flatten(2).sort(-1).values for layer in cache.layers]
    same_heads = all(torch.equal(k[:, 0], k[:, 1]) for k in kept)
    same_layers = all(k.shape == kept[0].shape and torch.equal(k, kept[0]) for k in kept)
    assert (same_heads, same_layers) == {"head": (False, False), "layer": (True, False), "global": (True, True)}[scope]


@pytest.mark.parametrize("kind", ["qwen2", "mistral_sliding"])
def test_beams_reorder_like_copies(kind):
    """Beam search over a compressed cache equals the same search with every row's cache computed alone."""
    model = tiny(kind)
    ids, mask = prompts(2)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, budget=0.5, policy="knorm", window=24, tiers=(4, 8), min_tokens=0)
        with torch.no_grad():
            model(ids, attention_mask=mask, **cache_kwargs(cache))
        index = torch.tensor([1, 1, 0, 1])
        cache.reorder_cache(index)
        tokens = torch.tensor([[7], [8], [9], [10]])
        longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)[index]
        with torch.no_grad():
            many = model(tokens, attention_mask=longer, **cache_kwargs(cache)).logits
            for row, source in enumerate(index.tolist()):
                alone = SmartKVCache(model.config, budget=0.5, policy="knorm", window=24, tiers=(4, 8), min_tokens=0)
                model(ids[source : source + 1], attention_mask=mask[source : source + 1], **cache_kwargs(alone))
                one = model(tokens[row : row + 1], attention_mask=longer[row : row + 1], **cache_kwargs(alone)).logits
                assert (many[row] - one[0]).abs().max() < 2e-2  # windows of a batch share their size: not bit-equal
        report = cache.report()
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert cache.report().total_bytes < 0.7 * report.total_bytes
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4 if hasattr(cache, "batch_size") else True


def test_generate_with_beams_and_compression_runs_within_budget():
    model = tiny("qwen3")
    ids, mask = prompts(2, 400)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, budget=0.5, policy="keydiff", window=16, min_tokens=0)
        model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=30, **cache_kwargs(cache), do_sample=False)
    assert cache.report().tokens_per_tier["evicted"] >= 0


def test_assisted_decoding_never_pays_for_a_rejected_draft():
    """A policy that looks at positions alone does not care how tokens were grouped: drafts change nothing."""
    model = tiny("qwen2")
    ids, mask = prompts(1, 100)
    ids, mask = torch.cat([ids, ids], 1), torch.cat([mask, mask], 1)
    kwargs = dict(budget=0.4, policy="streaming_llm", tiers=(8,), window=32)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, **kwargs, min_tokens=0)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=60,
            do_sample=False,
            **cache_kwargs(cache),
            prompt_lookup_num_tokens=4,
        )
    assert out.shape[1] == ids.shape[1] + 60
    assert cache.get_seq_length() in (out.shape[1] - 1, out.shape[1])
    assert cache.report().tokens_per_tier["8"] > 10


def test_crop_into_packed_tokens():
    model = tiny("qwen2")
    ids, mask = prompts(2)
    with smartkv_ext.patch(model), torch.no_grad():
        cache = SmartKVCache(model.config, budget=None, policy="full", tiers=(16,), window=16, min_tokens=0)
        model(ids, attention_mask=mask, **cache_kwargs(cache))
        cache.crop(-70)
        assert cache.get_seq_length() == 80
        assert all(int(layer.store.positions().max()) < 80 for layer in cache.layers)
        with_crop = model(ids[:, 80:90], attention_mask=mask[:, :90], **cache_kwargs(cache)).logits
        plain = model(ids[:, :90], attention_mask=mask[:, :90]).logits[:, 80:]
    assert (with_crop - plain)[0].abs().max() < 1e-4


def test_reset_and_deepcopy():
    model = tiny("qwen2")
    ids, mask = prompts(2)
    with smartkv_ext.patch(model):
        cache = SmartKVCache(model.config, budget=0.5, policy="keydiff", window=24, min_tokens=0)
        first = generate(model, ids, mask, cache)
        twin = copy.deepcopy(cache)
        assert twin.layers[0].window.held("k").data_ptr() != cache.layers[0].window.held("k").data_ptr()
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.report().total_bytes == 0
        again = generate(model, ids, mask, cache)
    assert torch.equal(first.sequences, again.sequences)
