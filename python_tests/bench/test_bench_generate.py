"""bench.generate on a tiny random model: what it reports fits together, and an interrupted run continues."""

import dataclasses
import inspect
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import typer
from hf.tape import Recorder
from transformers import QuantizedCache, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

import bench.generate
import bench.generate_task
from bench.caches import DEFAULT, label, make_cache
from bench.generate import summarise
from bench.generate_task import Task
from smartkv_ext import ReplayedDecoder

FIELDS = {
    "prefill_tokens_per_s", "decode_tokens_per_s", "median_ms", "attention_ms", "decoded", "nll", "prefill_peak_bytes",
    "decode_peak_bytes", "resident_bytes", "held_bytes", "others_cpu",
}  # fmt: skip
CONTEXT, TOKENS = 200, 40


@pytest.fixture
def tiny(monkeypatch):
    """A random model in place of the named one, and a tokenizer that makes 3 characters a token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()

    def tokenizer(text, return_tensors):
        ids = [sum(map(ord, text[i : i + 3])) % 64 for i in range(0, len(text), 3)]
        return SimpleNamespace(input_ids=torch.tensor([ids]))

    monkeypatch.setattr(bench.generate_task, "load", lambda name, dtype, device: (model, tokenizer))
    return model


def task(kind, **changes):
    settings = {
        "kind": kind, "model": "tiny", "dtype": "float32", "context": CONTEXT, "tokens": TOKENS, "chunk": 0,
        "policy": "keydiff", "limit": 60.0, "threads": 1,
    }  # fmt: skip
    return Task(**settings | changes)


@pytest.mark.parametrize("kind", ("dynamic", "fp8", "smartkv:0.5", "smartkv:0.125"))
def test_measure(tiny, kind):
    if kind == "fp8" and "fp8" not in inspect.getsource(QuantizedCache.__init__):
        pytest.skip("this transformers has no fp8 cache")
    result = task(kind).speed() | task(kind).memory()
    assert result.keys() >= FIELDS
    assert result["decoded"] == TOKENS
    assert all(math.isfinite(x) for x in result.values() if isinstance(x, float))
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "median_ms", "attention_ms", "nll"):
        assert result[name] > 0
    assert tiny.config._attn_implementation != "smartkv", "the model is left as it was"
    if kind == "dynamic":
        assert result["held_bytes"] == 2 * 2 * (CONTEXT + TOKENS) * 64 * 4


def test_replayed_steps(tiny, monkeypatch):
    taped = partial(ReplayedDecoder, record=Recorder())
    monkeypatch.setattr(bench.generate_task, "ReplayedDecoder", taped)
    plain, replayed = (task(kind).speed() for kind in ("smartkv:0.9", "smartkv-graph:0.9"))
    assert replayed["nll"] == pytest.approx(plain["nll"], rel=1e-6)


def test_a_failure_in_this_process_is_an_error(tiny):
    settings = dataclasses.asdict(task("smart", device="meta"))
    assert bench.generate.run_worker(settings)["error"].startswith("ValueError: cache must be")


def test_clocks_of_smartkv(tiny):
    result = task("smartkv:0.5").speed()
    parts = result["op_us"] + result["packing_us"] + result["python_us"]
    assert parts == pytest.approx(result["layer_call_us"])
    assert min(result["op_us"], result["packing_us"], result["python_us"]) > 0
    assert 0 < result["maintenance_share"] < 1


def test_every_cache_decodes_the_same_tokens(tiny):
    """With nothing lost, the likelihood of the text is that of the full cache."""
    assert task("smartkv:1.0", tokens=8).speed()["nll"] == pytest.approx(
        task("dynamic", tokens=8).speed()["nll"], rel=5e-4
    )


def test_chunks_and_limit(tiny):
    result = task("smartkv:0.25", chunk=64, limit=0.0).speed()
    assert result["decoded"] == 4


def test_unknown_cache(tiny):
    with pytest.raises(ValueError, match="smartkv:BUDGET"):
        make_cache("smart", tiny.config)


def test_labels_differ():
    assert len({label(kind) for kind in DEFAULT}) == len(DEFAULT)


def fake_result(kind, context, repeat=0, speed=10.0, **changes):
    settings = {"kind": kind, "context": context, "repeat": repeat}
    result = {"decode_tokens_per_s": speed, "held_bytes": None} | changes
    return {"settings": settings, "result": result}


def test_summary_takes_medians_and_compares_within_a_context():
    rows = summarise([
        fake_result("smartkv:0.5", 200, speed=30.0),
        fake_result("dynamic", 100, speed=20.0),
        *(fake_result("dynamic", 200, i, speed) for i, speed in enumerate((10.0, 12.0, 90.0))),
        {"settings": {"kind": "hqq:4", "context": 200, "repeat": 0}, "result": {"error": "no such thing"}},
    ])  # fmt: skip
    found = {(row["context"], row["cache"]): row for row in rows}
    assert [row["context"] for row in rows] == [100, 200, 200, 200]
    assert found[200, "DynamicCache"]["decode_tokens_per_s"] == 12.0
    assert found[200, "SmartKV 0.5"]["speedup"] == 2.5
    assert found[100, "DynamicCache"]["speedup"] == 1.0
    assert found[200, "hqq 4"]["error"] == "no such thing"


def test_an_interrupted_run_continues(monkeypatch, tmp_path):
    app = typer.Typer()
    app.command()(bench.generate.main)
    asked = []

    def worker(settings):
        if settings["kind"] == "fp8" and len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(settings["kind"])
        result = {name: 0.01 for name in FIELDS}
        return result if settings["kind"] != "hqq:4" else {"error": "needs a GPU"}

    monkeypatch.setattr(bench.generate, "run_worker", worker)
    out = tmp_path / "out.jsonl"
    arguments = ["--context", "50", "60", "--out", str(out)]
    for kind in ("dynamic", "fp8", "hqq:4"):
        arguments += ["--cache", kind]

    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 130
    assert [json.loads(line)["settings"]["kind"] for line in out.read_text().splitlines()] == ["dynamic"]

    asked += ["interrupted"]
    second = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert second.exit_code == 0
    assert asked[2:] == ["fp8", "hqq:4", "dynamic", "fp8", "hqq:4"], "the first one is not measured again"
    assert "needs a GPU" in second.stdout, "a failure is shown, not hidden"
    rows = json.loads(second.stdout.splitlines()[-1])["rows"]
    assert {(row["context"], row["cache"]) for row in rows} == {
        (context, name) for context in (50, 60) for name in ("DynamicCache", "fp8", "hqq 4")
    }


def test_what_a_busy_machine_measured_is_measured_again(monkeypatch, tmp_path):
    app = typer.Typer()
    app.command()(bench.generate.main)
    shares = iter((0.5, 0.01))
    monkeypatch.setattr(
        bench.generate, "run_worker", lambda settings: {name: 1.0 for name in FIELDS} | {"others_cpu": next(shares)}
    )
    arguments = ["--cache", "dynamic", "--out", str(tmp_path / "out.jsonl"), "--json"]
    found = []
    for _ in range(3):  # the third has nothing to do
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        (row,) = json.loads(result.stdout.splitlines()[-1])["rows"]
        found.append(row["others_cpu"])
    assert found == [0.5, 0.01, 0.01]
