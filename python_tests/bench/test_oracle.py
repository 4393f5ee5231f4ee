"""The oracle knows what is attended to later, and keeps that."""

import pytest
import torch
from hf.tiny import prompts, tiny, write_model

import smartkv_ext
from bench.oracle import Oracle, future_attention, futures
from smartkv_ext.cli.models import load_model
from smartkv_ext.eval.recording import record
from smartkv_ext.eval.tasks import TaskOptions, get_documents

TEXT = " ".join(f"Line {i} of the text says {i * i}." for i in range(400))


def dense(model, ids, n):
    """(layers, kv_heads, n): attention of the tokens after the first n, by the model's own probabilities."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = torch.stack(model(ids, output_attentions=True).attentions)[:, 0]
    return probabilities.unflatten(1, (2, -1))[..., n:, :n].sum((2, 3))


def test_the_future_is_what_the_model_attends_to():
    model = tiny("qwen2")
    ids, _ = prompts(1, 150)
    with smartkv_ext.patch(model), torch.no_grad():
        found = future_attention(model, ids[:, :120], ids[:, 120:])
    want = dense(model, ids, 120)
    assert found.shape == want.shape
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


def test_the_oracle_keeps_it():
    model = tiny("qwen2")
    ids, _ = prompts(1, 300)
    document, rest = ids[:, :260], ids[:, 260:]
    oracle = Oracle("oracle", {"budget": "0.5", "tiers": "16", "window": "16"}, {tuple(document[0].tolist()): rest})
    with smartkv_ext.patch(model), torch.no_grad():
        cache = oracle.prefill(model, record(model, document))
        table = future_attention(model, document, rest)
    for i, layer in enumerate(cache.layers):
        positions = layer.store.positions()[0]
        packed = table[i][:, 4:-16]
        for head in range(2):
            here = positions[head][positions[head] >= 0].long()
            if 0 < len(here) < packed.shape[1]:
                gone = torch.ones(260, dtype=torch.bool)
                gone[here], gone[:4], gone[-16:] = False, False, False
                assert table[i, head, here].min() >= table[i, head, gone].max()
    assert cache.report().ratio <= 0.5 and cache.report().tokens_per_tier["evicted"] > 20


@pytest.mark.parametrize("task", ["text", "recall"])
def test_every_document_has_a_future(task, tmp_path):
    write_model(tmp_path / "model", TEXT)
    (tmp_path / "text.txt").write_text(TEXT)
    _, tokenizer = load_model(str(tmp_path / "model"), "float32")
    options = TaskOptions(tokenizer, texts=(str(tmp_path / "text.txt"),), lengths=(700,), scored=20)
    documents = list(get_documents([task], options))
    (rest,) = futures(tokenizer, documents).values()
    assert rest.shape[0] == 1 and rest.shape[1] >= 20
    if task == "recall":
        said = tokenizer.decode(rest[0])
        assert all(q.answers[0].strip() in said for q in documents[0].questions)
