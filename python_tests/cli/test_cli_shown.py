"""What people see: streamed answers, tables, the demo, one sentence when something fails."""

import json

import pytest
from cli_runner import ask, call

from smartkv_ext.cli.demo import NOTE, QUESTION


def test_answer_is_streamed_then_tables(folder, document):
    done = ask(folder, document, "--budget", "0.5", "--max-new-tokens", "4", "--compare")
    assert done.exit_code == 0, done.output
    order = [done.stdout.index(text) for text in ("SmartKV: ", "full cache: ", "KV cache of", "Answers: ")]
    assert order == sorted(order)


def test_answer_has_no_partial_characters(folder, document):
    """A random byte-level model writes broken UTF-8: what was streamed must be what is reported."""
    done = ask(folder, document, "--budget", "0.5", "--max-new-tokens", "24", "--json")
    text = json.loads(done.stdout)["smartkv"]["text"]
    assert text in done.stderr


def test_chunks_lose_nothing_without_a_limit(folder, document):
    """At 16 bits without a limit, however the document is cut."""
    options = ("--budget", "none", "--tiers", "16", "--max-new-tokens", "8", "--json")
    runs = [json.loads(ask(folder, document, *options, "--chunk", n).stdout)["smartkv"] for n in (64, 4096)]
    assert runs[0]["token_ids"] == runs[1]["token_ids"]
    assert runs[0]["after_document"]["tokens_seen"] == runs[1]["after_document"]["tokens_seen"]


def test_demo_says_what_it_shows(folder, monkeypatch):
    monkeypatch.setattr("smartkv_ext.cli.demo.NUM_TOKENS", 1000)
    done = call("demo", "--model", folder, "--budget", "0.5")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    for text in (
        NOTE,
        QUESTION,
        "budget 0.5, policy",
        "before the question is known",
        "A best case",
        "Answers: ",
        "KV cache of",
    ):
        assert text in said
    found = json.loads(call("demo", "--model", folder, "--budget", "0.5", "--json").stdout)
    assert found["note"] == NOTE and found["full"]["right"] in (True, False)


@pytest.mark.slow
def test_demo_on_the_real_model():
    """The promise of `make demo`: an eighth of the bytes, and what the note says is still known."""
    result = json.loads(call("demo", "--json").stdout)
    assert result["full"]["right"] and result["smartkv"]["right"]
    assert result["smartkv"]["after_answer"]["ratio"] <= 0.125


def test_policies_and_doctor_for_people():
    assert "keydiff" in call("policies").stdout
    done = call("doctor")
    assert done.exit_code == 0 and "kernel set" in done.stdout and "decode_attention" in done.stdout


@pytest.mark.parametrize("name", ["_prefill", "_Stream.show"])
def test_interrupt_while_computing(folder, document, monkeypatch, name):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"smartkv_ext.cli.run.{name}", interrupt)
    done = ask(folder, document, "--budget", "0.5")
    assert done.exit_code == 130
    assert "Interrupted." in done.stderr and "Traceback" not in done.output


def test_lack_of_memory_is_one_sentence(folder, document, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("not enough memory: you tried to allocate 1 TB\nmore lines")

    monkeypatch.setattr("smartkv_ext.cli.run._prefill", fail)
    done = ask(folder, document, "--budget", "0.5")
    assert done.exit_code == 1 and done.stderr.strip().endswith("allocate 1 TB")
