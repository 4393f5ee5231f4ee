"""The harness's requests, against a plain forward."""

from types import SimpleNamespace

import pytest
import torch

from python_tests.eval.tokenizer import WordTokenizer
from python_tests.hf.tiny import tiny
from smartkv_ext.eval.lm_eval import CompressedModel

TEXT = " ".join(f"word{i % 83}" for i in range(200))


@pytest.fixture(scope="module")
def parts():
    tokenizer = WordTokenizer()
    tokenizer(TEXT)
    return tiny("qwen2"), tokenizer


def request(*args):
    return SimpleNamespace(args=args)


def test_loglikelihood_with_the_full_cache(parts):
    model, tokenizer = parts
    context, continuation = TEXT[: TEXT.index("word82")], " word3 word7 word5"
    ids = tokenizer(context.strip() + continuation, return_tensors="pt").input_ids
    logs = model(ids).logits[0].log_softmax(-1)
    expected = logs[-4:-1].gather(1, ids[0, -3:, None]).sum().item()
    full = CompressedModel(model, tokenizer, "full")
    ((value, greedy),) = full.loglikelihood([request(context.strip(), continuation)])
    assert value == pytest.approx(expected, abs=1e-3) and not greedy
    best = logs[-4].argmax().item()
    if best in tokenizer.words:
        ((_, greedy),) = full.loglikelihood([request(context.strip(), tokenizer.words[best])])
        assert greedy


def test_compression_changes_the_score(parts):
    model, tokenizer = parts
    values = [
        CompressedModel(model, tokenizer, spec).loglikelihood([request(TEXT, " word9")])[0][0]
        for spec in ("full", "uniform bits=2 window=8")
    ]
    assert values[0] != values[1]


def test_generation_stops(parts):
    model, tokenizer = parts
    small = CompressedModel(model, tokenizer, "smartkv budget=0.5 window=16")
    (text,) = small.generate_until([request(TEXT, {"max_gen_toks": 6})])
    assert len(text.split()) == 6 and small.held.ratio < 0.6
    words = text.split()
    (short,) = small.generate_until([request(TEXT, {"max_gen_toks": 6, "until": [words[2]]})])
    assert short.split() == words[: words.index(words[2])]


def test_rolling_scores_the_second_half(parts):
    model, tokenizer = parts
    (value,) = CompressedModel(model, tokenizer, "full").loglikelihood_rolling([request(TEXT)])
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    logs = model(ids).logits[0].log_softmax(-1)
    expected = logs[99:-1].gather(1, ids[0, 100:, None]).sum().item()
    assert value == pytest.approx(expected, rel=1e-4)


def test_bad_requests(parts):
    model, tokenizer = parts
    with pytest.raises(ValueError, match="at least 3 tokens"):
        CompressedModel(model, tokenizer, "full").generate_until([request("word1", {})])
    assert torch.is_grad_enabled()
