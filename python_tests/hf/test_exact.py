"""With tier 16 and no eviction the model is the model: every kind, every way to generate."""

import copy

import pytest
import torch
import transformers
from hf.tiny import KINDS, assert_same, generate, prompts, tiny
from transformers import DynamicCache

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs


def exact(model, **kwargs):
    """A cache whose tokens leave a small window for 16-bit pages, and nothing is lost."""
    arguments = dict(budget=None, policy="full", tiers=(16,), window=16, sinks=4) | kwargs
    return SmartKVCache(model.config, **arguments, min_tokens=0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_sdpa(kind, batch):
    model = tiny(kind)
    ids, mask = prompts(batch)
    reference = generate(model, ids, mask)
    with smartkv_ext.patch(model):
        cache = exact(model)
        assert_same(reference, generate(model, ids, mask, cache))
        assert cache.get_seq_length() == ids.shape[1] + 23
        assert cache.report().tokens_per_tier["16"] > 10, "the test must go through pages"
        assert_same(reference, generate(model, ids, mask))  # a DynamicCache still works while patched
    assert_same(reference, generate(model, ids, mask))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_prefill(kind, chunk):
    model = tiny(kind)
    ids, mask = prompts(3)
    reference = generate(model, ids, mask, new=8)
    if chunk == 1:
        ids, mask = ids[:, -40:], mask[:, -40:]
        reference = generate(model, ids, mask, new=8)
    with smartkv_ext.patch(model):
        assert_same(reference, generate(model, ids, mask, exact(model), new=8, prefill_chunk_size=chunk))


@pytest.mark.parametrize("kind", KINDS)
def test_beams(kind):
    model = tiny(kind)
    ids, mask = prompts(2)
    kwargs = dict(num_beams=3, max_new_tokens=40, do_sample=False, attention_mask=mask)
    reference = model.generate(ids, **kwargs)
    with smartkv_ext.patch(model):
        assert torch.equal(reference, model.generate(ids, **cache_kwargs(exact(model)), **kwargs))


def test_sampling_several_sequences():
    model = tiny("qwen2")
    ids, mask = prompts(2)
    kwargs = dict(do_sample=True, top_k=0, num_return_sequences=2, max_new_tokens=30, attention_mask=mask)
    torch.manual_seed(5)
    reference = model.generate(ids, **kwargs)
    with smartkv_ext.patch(model):
        torch.manual_seed(5)
        assert torch.equal(reference, model.generate(ids, **cache_kwargs(exact(model)), **kwargs))


@pytest.mark.parametrize("mode", ["assistant", "prompt_lookup"])
@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding(kind, mode):
    model = tiny(kind)
    ids, mask = prompts(1, 60)
    ids, mask = torch.cat([ids, ids], 1), torch.cat([mask, mask], 1)
    kwargs = dict(prompt_lookup_num_tokens=4)
    if mode == "assistant":
        assistant = tiny(kind)
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        kwargs = dict(assistant_model=assistant)
    reference = model.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False)
    try:
        model.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False, **kwargs)
    except RuntimeError as error:  # 5.17 and its own cache, with an assistant that slides
        pytest.skip(f"transformers {transformers.__version__} cannot do it without us: {error}")
    with smartkv_ext.patch(model):
        cache = exact(model)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=48, do_sample=False, **cache_kwargs(cache), **kwargs
        )
    assert torch.equal(reference, out)
    assert cache.get_seq_length() in (out.shape[1] - 1, out.shape[1])
    assert cache.report().tokens_per_tier["16"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_turns_and_prefix_reuse(kind):
    model = tiny(kind)
    ids, mask = prompts(3)
    turn = torch.randint(3, 98, (3, 9), generator=torch.Generator().manual_seed(9))

    def run(cache):
        first = generate(model, ids, mask, cache, new=20)
        longer = torch.cat([first.sequences, turn], 1)
        longer_mask = torch.nn.functional.pad(mask, (0, longer.shape[1] - mask.shape[1]), value=1)
        twin = copy.deepcopy(cache)
        return [generate(model, longer, longer_mask, c, new=20) for c in (cache, twin)]

    reference = run(DynamicCache(config=model.config))
    with smartkv_ext.patch(model):
        for a, b in zip(reference, run(exact(model)), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny("qwen3").to(dtype)
    ids, mask = prompts(3)
    with torch.no_grad():
        exact_logits = tiny("qwen3")(ids, attention_mask=mask).logits[:, -1].double()
        theirs = model(ids, attention_mask=mask).logits[:, -1].double()
        with smartkv_ext.patch(model):
            cache = exact(model)
            model(ids[:, :-1], attention_mask=mask[:, :-1], **cache_kwargs(cache))
            ours = model(ids[:, -1:], attention_mask=mask, **cache_kwargs(cache)).logits[:, -1].double()
    assert (ours - exact_logits).norm() <= 2 * (theirs - exact_logits).norm()


def test_one_token_prompt_and_empty_batch_rows():
    model = tiny("qwen2")
    ids = torch.tensor([[5]])
    reference = generate(model, ids, torch.ones_like(ids), new=60)
    with smartkv_ext.patch(model):
        assert_same(reference, generate(model, ids, torch.ones_like(ids), exact(model), new=60))


def test_compiled_model_gives_the_same_tokens():
    model = tiny("qwen2")
    ids, mask = prompts(1, 80)
    reference = generate(model, ids, mask, new=12)
    with smartkv_ext.patch(model):
        compiled = torch.compile(model, backend="aot_eager")
        cache = exact(model)
        with torch.no_grad():
            logits = compiled(ids, attention_mask=mask, **cache_kwargs(cache)).logits[:, -1]
            tokens = []
            for _ in range(12):
                tokens.append(int(logits.argmax()))
                logits = compiled(torch.tensor([[tokens[-1]]]), **cache_kwargs(cache)).logits[:, -1]
    assert tokens == reference.sequences[0, ids.shape[1] :].tolist()


def test_training_and_no_cache_fall_back():
    model = tiny("qwen3")
    ids, mask = prompts(3)
    labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)  # what a padding position predicts is undefined
    reference = model(ids, attention_mask=mask, labels=labels).loss
    with smartkv_ext.patch(model):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
    assert torch.allclose(reference, loss, atol=1e-5)
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
