"""The search: expressions stay valid, what is accepted has earned it, a stopped search goes on as before."""

import ast
import json
import random

import pytest
import torch
from typer.testing import CliRunner

from smartkv_ext.policies import get_policy
from smartkv_ext.policies.expression import Expression, walk
from smartkv_ext.policies.features import FEATURES
from training import evolve
from training.grammar import MAX_NODES, Grammar, replace, size
from training.journal import Journal
from training.reconstruction import reconstruction_errors
from training.samples import Samples
from training.synthetic import Pattern, generate_traces
from training.texts import documents, read_text

SMALL = Pattern(documents=2, layers=2, tokens=96, future=32)


@pytest.fixture(scope="module")
def splits():
    return {name: Samples.of_traces(generate_traces(name, SMALL)) for name in ("train", "valid", "test")}


@pytest.fixture(scope="module")
def gated(splits):
    """The same, with something in place of gates' scores."""
    score = {name: {"gate": torch.sin(1e4 * s.features["key_norm"])} for name, s in splits.items()}
    return {name: Samples(s.features | score[name], s.future) for name, s in splits.items()}


def run(*arguments):
    app = evolve.typer.Typer()
    app.command()(evolve.main)
    return CliRunner().invoke(app, [str(x) for x in arguments])


def refusal(*arguments):
    """What a run that fails says, out of its box."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def save(splits, folder):
    folder.mkdir(exist_ok=True)
    for name, samples in splits.items():
        samples.save(folder / f"{name}.safetensors")
    return folder


def search(splits, path, generations, seed=3):
    book = Journal(path, {"seed": seed})
    found = evolve.Search(splits["train"], splits["valid"], book, seed, window=4)
    found.run(generations, 25, lambda row: None)
    return found


def test_mutations_and_crossovers_stay_readable_expressions():
    grammar, rng = Grammar(FEATURES), random.Random(0)
    texts = list(evolve.SEEDS.values())
    kinds = set()
    for _ in range(600):
        text = rng.choice(texts)
        kind, tree = grammar.mutate(text, rng)
        kinds.add(kind)
        new = grammar.tidy(tree if rng.random() < 0.7 else grammar.cross(text, rng.choice(texts), rng))
        if new is not None:
            expression = Expression(new, FEATURES)
            assert size(expression) <= MAX_NODES and any(expression.uses(name) for name in FEATURES)
            texts.append(new)
    assert kinds == {"constant", "leaf", "operator", "subtree", "wrap", "shrink"}
    assert len(set(texts)) > 300


def test_replace_changes_one_node():
    tree = Expression("a + b * min(c, a)", ("a", "b", "c")).tree
    nodes = list(walk(tree))
    new = Expression("x", ("x",)).tree
    texts = [ast.unparse(replace(tree, i, new)) for i in range(len(nodes))]
    assert texts == ["x", "x + b * min(c, a)", "a + x", "a + x * min(c, a)", "a + b * x", "a + b * min(x, a)",
                     "a + b * min(c, x)"]  # fmt: skip
    assert Grammar(("a",)).tidy(Expression("a * (1 + 2) - 4 / (1 - 3)", ("a",)).tree) == "a * 3.0 - -2.0"
    assert Grammar(("a",)).tidy(Expression("1 + 2", ()).tree) is None


def test_samples_give_the_error_of_the_policy(splits):
    traces = generate_traces("train", SMALL)
    for name in ("layer_aware", "h2o"):
        errors = reconstruction_errors(get_policy("evolved", expression=evolve.SEEDS[name]), traces, window=4)
        found = splits["train"].error(Expression(evolve.SEEDS[name], FEATURES), 4)
        assert found == pytest.approx(sum(errors) / 3, abs=1e-5)


def test_what_is_accepted_beats_its_parent_on_both_splits(tmp_path, splits):
    found = search(splits, tmp_path / "a.jsonl", 6)
    by_id = {c.id: c for c in found.journal.candidates}
    children = [c for c in by_id.values() if c.parents]
    assert sum(c.accepted for c in children) > 3
    for child in children:
        parent = by_id[child.parents[0]]
        assert child.accepted == (
            found.cost(child)[0] < found.cost(parent)[0] and child.valid is not None and child.valid < parent.valid
        )
        assert (child.valid is None) == (found.cost(child)[0] >= found.cost(parent)[0]), "VALID is asked only then"
    best = found.journal.champion()
    seeds = [c for c in by_id.values() if c.kind in evolve.SEEDS]
    assert best.valid < min(c.valid for c in seeds)


def test_a_stopped_search_goes_on_as_if_it_had_not_been(tmp_path, splits):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    search(splits, whole, 4)
    data = whole.read_bytes()
    first = data.index(b"\n")
    population = data.index(b"\n", data.index(b"population"))
    for cut in (0, first // 2, first, first + 1, population, population + 1, len(data) // 2, len(data) - 1, len(data)):
        stopped.write_bytes(data[:cut])  # in the middle of a line, before its end, after it
        search(splits, stopped, 4)
        assert stopped.read_bytes() == data, cut
    assert sorted(x.name for x in tmp_path.iterdir()) == ["stopped.jsonl", "whole.jsonl"]


def test_a_journal_is_for_one_search(tmp_path, splits):
    search(splits, tmp_path / "a.jsonl", 2)
    with pytest.raises(ValueError, match="was written with"):
        Journal(tmp_path / "a.jsonl", {"seed": 4})
    (tmp_path / "b.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match="was written with"):
        Journal(tmp_path / "b.jsonl", {"seed": 3})
    (tmp_path / "c.jsonl").write_text('{"settings": {"seed": 3}}\nnot json\n{}\n')
    with pytest.raises(ValueError, match="line 2: not a journal"):
        Journal(tmp_path / "c.jsonl", {"seed": 3})
    for foreign in ("a letter without an end of line", "5\n", "[1]\n"):
        (tmp_path / "d.txt").write_text(foreign)
        with pytest.raises(ValueError, match="line 1: not a journal"):
            Journal(tmp_path / "d.txt", {"seed": 3})
        assert (tmp_path / "d.txt").read_text() == foreign


def test_the_command_looks_at_test_once_and_exports_a_policy(tmp_path, splits, monkeypatch):
    folder = save(splits, tmp_path / "samples")
    opened = []
    load = Samples.load
    monkeypatch.setattr(Samples, "load", staticmethod(lambda path: opened.append(path.stem) or load(path)))
    arguments = ["--journal", tmp_path / "j.jsonl", "--samples", folder, "--generations", "4", "--children", "20"]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert opened == ["train", "valid", "test"]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["test"]["champion"] > 0 and set(evolve.SEEDS) < set(result["test"])
    again = run(*arguments, "--export", tmp_path / "best.json")
    assert opened == ["train", "valid", "test"], "a search that is over opens nothing"
    assert json.loads(again.stdout.splitlines()[-1])["test"] == result["test"]
    policy = get_policy(str(tmp_path / "best.json"))
    assert policy.name == "evolved" and policy.expression == result["expression"]


def test_gates_give_the_search_a_feature(tmp_path, gated):
    assert "gate" in gated["train"].names
    folder = save(gated, tmp_path / "samples")
    done = run("--journal", tmp_path / "j.jsonl", "--samples", folder, "--generations", "3", "--children", "60")
    assert done.exit_code == 0, done.output
    assert set(evolve.GATE_SEEDS) < set(json.loads(done.stdout.splitlines()[-1])["test"])
    tried = [json.loads(line).get("expression", "") for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert sum("gate" in text for text in tried) > 10 and any("gate" in t and "recent" in t for t in tried)
    for text in filter(None, tried):
        get_policy("evolved", expression=text)  # every one could be exported
    assert Grammar(("gate", "cumulative")).tidy(ast.parse("gate + cumulative", mode="eval").body) is None


def test_samples_that_do_not_fit_are_refused_before_the_search(tmp_path, splits, gated):
    arguments = ["--journal", tmp_path / "j.jsonl", "--samples", save(splits, tmp_path / "s"), "--generations", "1"]
    test = tmp_path / "s" / "test.safetensors"
    test.unlink()
    assert "does not exist" in refusal(*arguments) and not (tmp_path / "j.jsonl").exists()
    gated["test"].save(test)
    assert "the same features" in refusal(*arguments) and not (tmp_path / "j.jsonl").exists()
    splits["test"].save(test)
    assert run(*arguments).exit_code == 0
    replaced = Samples(splits["train"].features, splits["train"].future.flip(-1))  # as many bytes
    replaced.save(tmp_path / "s" / "train.safetensors")
    assert "was written with" in refusal(*arguments)


class Words:
    """A tokenizer of single characters."""

    def __call__(self, text, return_tensors):
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(c) for c in text]])})


def test_texts_are_read_in_parts(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    assert read_text(f"{tmp_path}/a.txt@0.5-0.55") == "01234"
    (tmp_path / "b.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": "Why?", "answer": "So."}\n')
    assert read_text(str(tmp_path / "b.jsonl")) == "1+1?\n2\n\nWhy?\nSo."
    pieces = documents(Words(), str(tmp_path / "a.txt"), 2, 20)
    assert [len(p[0]) for p in pieces] == [20, 20] and torch.equal(pieces[0], pieces[1])
    for source, message in (
        ("missing.txt", "does not exist"), (f"{tmp_path}/a.txt@half", "must look like 0.5-1; got 'half'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_text(source)
    with pytest.raises(ValueError, match="too little text"):
        documents(Words(), str(tmp_path / "a.txt"), 2, 90)
    (tmp_path / "c.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(ValueError, match="must hold exercises"):
        read_text(str(tmp_path / "c.jsonl"))
