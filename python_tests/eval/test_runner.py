"""Rows, their bytes, and resuming."""

import json

import pytest
import torch

from python_tests.eval.tokenizer import WordTokenizer
from python_tests.hf.tiny import tiny
from smartkv_ext.eval.items import Document, Question
from smartkv_ext.eval.methods import get_method
from smartkv_ext.eval.metrics import METRICS
from smartkv_ext.eval.runner import Results, Settings, evaluate, read_rows
from smartkv_ext.eval.tasks import TaskOptions, get_documents

WORDS = " ".join(f"word{i % 83}" + "." * (i % 9 == 0) for i in range(4000))
OURS = "smartkv policy=keydiff budget=0.25 window=16"
METHODS = ["full", OURS, "uniform bits=2 window=16", "kivi bits=2 residual=32"]


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2").to(torch.bfloat16)


def options(tmp_path, **more):
    (tmp_path / "words.txt").write_text(WORDS)
    return TaskOptions(WordTokenizer(), texts=(f"{tmp_path}/words.txt",), lengths=(300,), scored=40, **more)


def run(model, options, path, specs=METHODS, tasks=("text", "recall"), **settings):
    methods = [get_method(spec) for spec in specs]
    chosen = Settings("tiny", "bfloat16", **settings)
    evaluate(model, options.tokenizer, get_documents(tasks, options), methods, Results(path), chosen)
    return read_rows(path)


def test_rows(model, tmp_path):
    rows = run(model, options(tmp_path), tmp_path / "rows.jsonl")
    text = {row["method"]: row for row in rows if row["kind"] == "text"}
    assert text["full"]["kl"] == 0 and text["full"]["top1"] == 1 and text["full"]["ratio"] == 1
    assert all(row["kl"] > 1e-4 for name, row in text.items() if name != "full")
    assert text[get_method(METHODS[1]).spec]["ratio"] <= 0.25
    assert text["full"]["nll"] == pytest.approx(text["full"]["full_nll"], abs=1e-6)
    recall = [row for row in rows if row["task"] == "recall"]
    assert len(recall) == 8 * len(METHODS) and {row["depth"] for row in recall} >= {5, 95}
    assert len({(row["method"], row["bytes"]) for row in recall}) == len(METHODS)


def test_resume(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    first = run(model, options(tmp_path), path, METHODS[:2])
    with path.open("a") as file:
        file.write('{"format": 1, "cut o')
    assert run(model, options(tmp_path), path, METHODS[:2]) == first
    later = run(model, options(tmp_path), path, METHODS[:3], tasks=["text"])
    said: list[str] = []
    documents, results = get_documents(["text"], options(tmp_path)), Results(path)
    methods = [get_method(spec) for spec in METHODS[:3]]
    evaluate(model, WordTokenizer(), documents, methods, results, Settings("tiny", "bfloat16"), said.append)
    assert len(said) == 1 and said[0].endswith("| 3 of 3 methods skipped: rows.jsonl has their rows already (3)")
    assert later[:-1] == first and later[-1]["method"] == get_method(METHODS[2]).spec
    assert "cut o" not in path.read_text()
    path.write_text(json.dumps(first[0] | {"defaults": 2}) + "\n")  # measured before a default changed
    with pytest.raises(ValueError, match="other defaults of the methods: name a new file"):
        Results(path)
    path.write_text("no json\n{}\n")
    with pytest.raises(ValueError, match="line 1"):
        Results(path)


def test_forced_score_is_greedy_decoding(model, tmp_path):
    """The answer that greedy decoding gives is the one that counts as right, under both ways of asking."""
    tokenizer = WordTokenizer()
    context = " ".join(WORDS.split()[:200])
    ask = Question("q", " what is it", ("",), "string_match_all", max_new_tokens=3)
    path, settings, methods = tmp_path / "a.jsonl", Settings("tiny", "bfloat16"), [get_method(OURS)]
    evaluate(model, tokenizer, [Document("t", "free", context, (ask,))], methods, Results(path), settings)
    said = read_rows(path)[0]["prediction"]
    forced = [Question(str(i), ask.text, (x,), "forced") for i, x in enumerate([said, " ".join(said.split()[::-1])])]
    evaluate(model, tokenizer, [Document("t", "forced", context, tuple(forced))], methods, Results(path), settings)
    right, wrong = read_rows(path)[1:]
    assert right["score"] == 1 and right["prediction"] == said
    assert wrong["score"] == 0 and wrong["answer_nll"] > right["answer_nll"]


def test_decoding_ends_when_the_score_cannot_change(model, tmp_path):
    context = " ".join(WORDS.split()[:200])
    path, settings, methods = tmp_path / "a.jsonl", Settings("tiny", "bfloat16"), [get_method("full")]
    ask = Question("q", " what is it", ("nowhere",), "string_match_all", max_new_tokens=6)
    evaluate(model, WordTokenizer(), [Document("t", "a", context, (ask,))], methods, Results(path), settings)
    said = read_rows(path)[0]["prediction"].split()
    ask = Question("q", " what is it", (said[1],), "string_match_all", max_new_tokens=6)
    evaluate(model, WordTokenizer(), [Document("t", "b", context, (ask,))], methods, Results(path), settings)
    row = read_rows(path)[1]
    assert len(said) == 6 and row["score"] == 1 and row["prediction"].split() == said[:2]


def test_query_aware_compresses_the_question(model, tmp_path):
    rows = [
        run(model, options(tmp_path), tmp_path / f"{aware}.jsonl", METHODS[1:2], ["recall"], query_aware=aware)
        for aware in (False, True)
    ]
    assert rows[1][0]["tokens"] > rows[0][0]["tokens"]
    assert not Results(tmp_path / "True.jsonl").done & Results(tmp_path / "False.jsonl").done


def test_a_rival_that_fails_is_reported(model, tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("no such thing")

    for name in ("QuantizedCache", "SmartKVCache"):
        monkeypatch.setattr(f"smartkv_ext.eval.methods.{name}", Broken)
    rows = run(model, options(tmp_path), tmp_path / "f.jsonl", ["quanto bits=4", "full"], ["text"])
    assert [row["kind"] for row in rows] == ["failed", "text"] and rows[0]["error"] == "no such thing"
    with pytest.raises(RuntimeError, match="no such thing"):
        run(model, options(tmp_path), tmp_path / "f.jsonl", [OURS], ["text"])


def test_maps(model, tmp_path):
    import base64
    import zlib

    row = run(model, options(tmp_path), tmp_path / "m.jsonl", METHODS[1:2], ["recall"], maps=True)[-1]
    assert row["kind"] == "map" and len(row["token_texts"]) == row["tokens"] == row["map_shape"][2]
    bits = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(row["map"]))), dtype=torch.uint8)
    bits = bits.view(row["map_shape"])
    held = sum(count for name, count in row["kept"].items() if name != "evicted")
    assert (bits > 0).sum().item() / bits[:, :, 0].numel() == pytest.approx(held)
    assert bits[:, :, :4].eq(160).all() and bits[:, :, -16:].eq(160).all()


def test_metrics():
    facts = {}
    assert METRICS["string_match_all"]("It is 12 and AB.", ["12", "ab", "c"], facts) == pytest.approx(2 / 3)
    assert METRICS["string_match_part"]("the Cat", ["dog", "cat"], facts) == 1
    assert METRICS["contains_words"]("It took 65,535 bytes", ["65535"], facts) == 1
    assert METRICS["contains_words"]("a 3rd one", ["3"], facts) == 0


def test_bad_specs():
    for spec, words in [("nothing", "begin with one of"), ("kivi bits", "name=value"), ("", "begin with")]:
        with pytest.raises(ValueError, match=words):
            get_method(spec)
    with pytest.raises(ValueError, match="no option colour; it has none"):
        get_method("full colour=red")
    with pytest.raises(ValueError, match="no option bit; it has bits, group, residual, sinks, v_bits"):
        get_method("kivi bit=4")
    assert get_method("smartkv  policy=h2o budget=.5").spec == get_method("smartkv budget=.5 policy=h2o").spec
    assert json.loads(json.dumps(get_method("full").spec)) == "full"


@pytest.mark.parametrize("spec", ["quanto bits=4", "hqq bits=4"])
def test_backends_of_transformers_answer(model, tmp_path, spec):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[spec.split()[0]])
    rows = run(model, options(tmp_path), tmp_path / "q.jsonl", ["full", spec], ["recall"])
    full, ours = rows[:8], rows[8:]
    assert len(ours) == 8 and ours[0]["ratio"] < 0.35
    assert 0 < abs(full[0]["answer_nll"] - ours[0]["answer_nll"]) < 1
