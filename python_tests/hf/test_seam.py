"""Where the cache and transformers meet: found by type, proven at run time, never by an argument's name."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from hf.tiny import assert_same, generate, prompts, tiny
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2Model

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs, is_patched
from smartkv_ext.hf.attention import smartkv_attention


class RenamedModel(Qwen2Model):
    def forward(self, *args, kv_store=None, **kwargs):
        return super().forward(*args, **cache_kwargs(kv_store), **kwargs)


class RenamedLayer(Qwen2DecoderLayer):
    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        kwargs["kv_store"] = kwargs.pop(*cache_kwargs(None))
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask=attention_mask, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RenamedAttention(Qwen2Attention):
    def forward(self, hidden_states, position_embeddings, attention_mask, kv_store=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, attention_mask, **cache_kwargs(kv_store), **kwargs)


class ForgetfulLayer(Qwen2DecoderLayer):
    """As of a release that no longer gives the cache to its attention in a way that we know."""

    def forward(self, *args, **kwargs):
        kwargs.pop(*cache_kwargs(None))
        return super().forward(*args, **kwargs)


def test_a_renamed_argument_changes_nothing():
    model = tiny("qwen2")
    ids, _ = prompts(1, 200)
    plain, renamed = copy.deepcopy(model), model.model
    renamed.__class__ = RenamedModel
    for layer in renamed.layers:
        layer.__class__ = RenamedLayer
        layer.self_attn.__class__ = RenamedAttention
    with torch.no_grad(), smartkv_ext.patch(model), smartkv_ext.patch(plain):
        caches = [SmartKVCache(model.config, budget=0.5, window=32, min_tokens=0) for _ in range(2)]
        for part in (ids[:, :180], ids[:, 180:]):
            got = renamed(part, kv_store=caches[0]).last_hidden_state
            assert torch.equal(got, plain.model(part, **cache_kwargs(caches[1])).last_hidden_state)
    assert caches[0].report() == caches[1].report() and caches[0].report().tokens_per_tier["evicted"] > 0


@pytest.mark.parametrize("forgetful", [[0, 1, 2, 3], [2]])
def test_a_cache_that_gets_nothing_is_an_error(forgetful):
    model = tiny("qwen2")
    for i in forgetful:
        model.model.layers[i].__class__ = ForgetfulLayer
    ids, _ = prompts(1, 40)
    cache = SmartKVCache(model)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    for given in (None, mask):
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match=rf"layer {forgetful[0]} of Qwen2Model did not bring.*transformers 5"),
        ):
            model(ids, attention_mask=given, **cache_kwargs(cache))
    assert cache.get_seq_length() == 0


def test_gradient_checkpointing_is_refused():
    """It takes the cache away, but not the mask that was made for it."""
    model = tiny("llama").train()
    model.gradient_checkpointing_enable()
    ids, _ = prompts(1, 40)
    with smartkv_ext.patch(model), pytest.raises(RuntimeError, match="gradient checkpointing"):
        model(ids, **cache_kwargs(SmartKVCache(model.config)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("s_aux", torch.zeros(4)),
        ("sinks", torch.zeros(4)),
        ("softcap", 30.0),
        ("shared_kv_states", {}),
        ("position_bias", torch.zeros(1)),
        ("cu_seq_lens_q", torch.tensor([0, 40])),
        ("is_causal", False),
        ("of_the_next_release", 1),
    ],
)
def test_arguments_that_would_change_the_result_are_refused(name, value):
    model = tiny("qwen2")
    ids, _ = prompts(1, 40)
    cache = SmartKVCache(model)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=name):
        model(ids, **cache_kwargs(cache), **{name: value})
    with torch.no_grad():
        model(ids, **cache_kwargs(cache), **{name: None if name != "is_causal" else True})
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("name", ["cache", "read_index", "block_table"])
def test_continuous_batching_is_refused(name):
    q = torch.zeros(1, 4, 3, 64)
    with pytest.raises(NotImplementedError, match="generate_batch"):
        smartkv_attention(torch.nn.Module(), q, q, q, None, **{name: object()})


def test_no_deprecation_warning_comes_from_our_own_calls():
    model = tiny("qwen2")
    ids, mask = prompts(2, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        generate(model, ids, mask, SmartKVCache(model, budget=0.5, window=24))


def test_a_model_takes_the_place_of_its_config():
    model = tiny("qwen2")
    ids, mask = prompts(2)
    with smartkv_ext.patch(model):
        expected = generate(model, ids, mask, SmartKVCache(model.config, budget=0.5, window=24))
    assert not is_patched(model)
    assert_same(expected, generate(model, ids, mask, SmartKVCache(model, budget=0.5, window=24)), atol=0)
    assert_same(expected, generate(model, ids, mask, SmartKVCache(model, budget=0.5, window=24)), atol=0)
    twin = copy.deepcopy(model)
    for patched in (model, twin):
        assert is_patched(patched)
        smartkv_ext.unpatch(patched)
        assert not is_patched(patched) and patched.config._attn_implementation == "sdpa"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in patched.modules())
        with pytest.raises(RuntimeError, match="needs a patched model"):
            generate(patched, ids, mask, SmartKVCache(patched.config))
    smartkv_ext.unpatch(model)


def test_models_of_one_config_are_patched_one_by_one():
    model = tiny("llama")
    other = type(model)(model.config).eval()
    ids, mask = prompts(1, 60)
    reference = generate(other, ids, mask)
    with smartkv_ext.patch(model):
        assert_same(reference, generate(other, ids, mask))  # our function, without a SmartKVCache
        with pytest.raises(RuntimeError, match="needs a patched model"):
            generate(other, ids, mask, SmartKVCache(model.config))
        cache = SmartKVCache(other, budget=None, tiers=(16,), window=16)
        assert_same(reference, generate(other, ids, mask, cache))
        smartkv_ext.unpatch(other)
        assert not is_patched(model), "its config has another attention now"
        cache = SmartKVCache(model, budget=None, tiers=(16,), window=16)
        assert is_patched(model)
        assert_same(generate(model, ids, mask), generate(model, ids, mask, cache))
    with pytest.raises(ValueError, match="budget"):
        SmartKVCache(model, budget=7)
    assert not is_patched(model), "refused arguments leave the model as it was"


def test_attention_chosen_when_the_model_is_loaded(tmp_path):
    tiny("qwen2").save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="smartkv")
    ids, mask = prompts(2)
    expected = generate(reference, ids, mask)
    assert_same(expected, generate(model, ids, mask))  # without a SmartKVCache: sdpa
    assert_same(expected, generate(model, ids, mask, SmartKVCache(model, budget=None, tiers=(16,), window=16)))
    smartkv_ext.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


class Wrapper(torch.nn.Module):
    """Goes around its own forward when it generates, as PEFT's models do."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


def test_a_wrapped_model():
    model = tiny("qwen2")
    ids, mask = prompts(2)
    reference = generate(model, ids, mask)
    wrapped = Wrapper(model)
    for seat in (lambda: smartkv_ext.patch(wrapped), lambda: smartkv_ext.patch(model)):
        with seat():
            assert_same(reference, generate(wrapped, ids, mask, SmartKVCache(wrapped.config, budget=None, tiers=(16,))))


def test_cache_and_handle_say_what_they_are():
    model = tiny("qwen2")
    cache = SmartKVCache(model, budget="1/8", policy="keydiff")
    assert repr(cache) == "SmartKVCache(policy='keydiff', budget=0.125 of the full cache, 0 tokens x 1, 0 bytes)"
    with torch.no_grad():
        model(prompts(2)[0], **cache_kwargs(cache))
    assert cache.nbytes == cache.report().total_bytes > 0
    assert "150 tokens x 2" in repr(cache) and f"{cache.nbytes:,} bytes" in repr(cache)
    smartkv_ext.unpatch(model)
    with smartkv_ext.patch(model) as handle:
        assert repr(handle) == "PatchHandle(Qwen2ForCausalLM, 4 layers)"
    assert repr(handle) == "PatchHandle(Qwen2ForCausalLM, removed)"


def test_nbytes_counts_what_the_report_counts():
    model = tiny("qwen2")
    ids, mask = prompts(2)
    for policy in ("auto", "h2o", "snapkv", "hybrid", "expected_attention"):
        cache = SmartKVCache(model, budget=0.5, policy=policy, window=24)
        generate(model, ids, mask, cache)
        assert cache.nbytes == cache.report().total_bytes


def test_importing_the_cache_imports_no_compiler():
    code = "import sys; from smartkv_ext import SmartKVCache; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_user_types_first():
    assert {"ops", "SmartKVCache", "patch", "policies"} <= set(dir(smartkv_ext))
    code = "import smartkv_ext; smartkv_ext.ops.quantize_kv; smartkv_ext.policies.get_policy('knorm')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_masks_are_read_as_transformers_reads_them():
    """Columns beyond the keys do not count, be the mask allocated ahead or every chunk given that of the whole prompt;
    one that is too short is refused, where transformers would take new tokens for padding."""
    model = tiny("qwen2")
    ids, mask = prompts(2, 60)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ahead = torch.nn.functional.pad(mask, (0, 40))
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        for given in (mask, ahead):
            cache = SmartKVCache(model, budget=None)
            parts = [
                model(ids[:, a:b], attention_mask=given, position_ids=positions[:, a:b], **cache_kwargs(cache)).logits
                for a, b in ((0, 25), (25, 59), (59, 60))
            ]
            assert (torch.cat(parts, 1)[mask.bool()] - plain).abs().max() < 1e-4
            assert cache.layers[0].row_tokens.tolist() == mask.sum(1).tolist()
        with pytest.raises(ValueError, match="a column for each of the 61 tokens so far"):
            model(ids[:, :1], attention_mask=mask[:, :1], **cache_kwargs(cache))
        assert cache.get_seq_length() == 60


@pytest.mark.parametrize("policy", ["auto", "h2o"])
def test_autocast(policy):
    """RoPE gives float32 keys beside bfloat16 values."""
    model = tiny("llama")
    ids, mask = prompts(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = generate(model, ids, mask, new=8)
        cache = SmartKVCache(model, budget=None, tiers=(16,), window=16, policy=policy)
        ours = generate(model, ids, mask, cache, new=8)
        small = SmartKVCache(model, budget=0.5, window=16, policy=policy, min_tokens=0)
        generate(model, ids, mask, small)
    assert cache.layers[0].dtype == torch.bfloat16 and small.report().tokens_per_tier["evicted"] > 0
    assert (ours.logits[0] - reference.logits[0]).abs().max() < 0.1


@pytest.mark.parametrize("policy", ["auto", "hybrid", "evolved", "snapkv"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(policy, default):
    model = tiny("qwen2").to(torch.bfloat16)
    ids, _ = prompts(1, 260)
    logits = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            cache = SmartKVCache(model, budget=0.5, window=16, policy=policy, min_tokens=0)
            with torch.no_grad():
                model(ids[:, :200], **cache_kwargs(cache))
                logits.append([model(x, **cache_kwargs(cache)).logits for x in ids[:, 200:].split(1, 1)])
        finally:
            torch.set_default_dtype(torch.float32)
    assert cache.report().tokens_per_tier["evicted"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
