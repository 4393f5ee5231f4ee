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
    best = found.champion()
    seeds = [c for c in by_id.values() if c.kind in evolve.SEEDS]
    assert best.valid < min(c.valid for c in seeds)


@pytest.mark.parametrize("cut", [0.35, 0.6, 0.98])
def test_a_stopped_search_goes_on_as_if_it_had_not_been(tmp_path, splits, cut):
    whole = tmp_path / "whole.jsonl"
    search(splits, whole, 6)
    data = whole.read_bytes()
    stopped = tmp_path / "stopped.jsonl"
    stopped.write_bytes(data[: int(cut * len(data))])  # in the middle of a line
    search(splits, stopped, 6)
    assert stopped.read_bytes() == data


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


def test_the_command_looks_at_test_once_and_exports_a_policy(tmp_path, splits, monkeypatch):
    folder = tmp_path / "samples"
    folder.mkdir()
    for name, samples in splits.items():
        samples.save(folder / f"{name}.safetensors")
    opened = []
    load = Samples.load
    monkeypatch.setattr(Samples, "load", staticmethod(lambda path: opened.append(path.stem) or load(path)))
    app = evolve.typer.Typer()
    app.command()(evolve.main)
    arguments = ["--journal", tmp_path / "j.jsonl", "--samples", folder, "--export", tmp_path / "best.json",
                 "--generations", "4", "--children", "20"]  # fmt: skip
    done = CliRunner().invoke(app, [str(x) for x in arguments])
    assert done.exit_code == 0, done.output
    assert opened == ["train", "valid", "test"]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["test"]["champion"] > 0 and set(evolve.SEEDS) < set(result["test"])
    policy = get_policy(str(tmp_path / "best.json"))
    assert policy.name == "evolved" and policy.expression == result["expression"]
    again = CliRunner().invoke(app, [str(x) for x in arguments])
    assert opened == ["train", "valid", "test"], "a search that is over opens nothing"
    assert json.loads(again.stdout.splitlines()[-1])["test"] == result["test"]


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
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="must hold exercises"):
        read_text(str(tmp_path / "c.jsonl"))
