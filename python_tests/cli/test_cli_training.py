"""explore, collect, train, evaluate, export by the command line."""

import importlib.util
import json
import sys

import pytest
import yaml
from cli_runner import DOCUMENT, call

from smartkv_ext.gates import Gates


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    """A recipe file of a few pieces of text for the tiny model."""
    home = tmp_path_factory.mktemp("recipe")
    for i in range(3):
        (home / f"{i}.txt").write_text(DOCUMENT[i * 500 :] * 3)
    content = {
        "model": str(folder), "dtype": "float32", "sources": {str(home): 1.0}, "length": 48, "tokens": 1,
        "target": "recon_sum", "epochs": 1, "horizon": 32,
    }  # fmt: skip
    path = home / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_train_leads_to_gates_that_the_other_commands_take(recipe, tmp_path):
    run = tmp_path / "run"
    result = call("train", "--recipe", recipe, "--out", run, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (
        found["gates"] == str(run / "gates")
        and found["parameters"] == Gates.from_pretrained(run / "gates").num_parameters
    )
    again = call("collect", "--recipe", recipe, "--out", run / "shards")
    assert again.exit_code == 0 and "is complete" in again.stdout
    result = call(
        "evaluate", "--gates", run / "training", "--data", run / "shards", "--out", tmp_path / "e", "--threshold", 0.2
    )
    assert result.exit_code == 0 and json.loads(result.stdout)["threshold"] == 0.2
    result = call("export", "--gates", run / "training", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "parameters" in result.stdout
    result = call("explore", "--recipe", recipe, "--out", tmp_path / "x", "--pieces", 1)
    assert result.exit_code == 0 and (tmp_path / "x" / "heads.csv").is_file()


def test_what_cannot_be_is_said_in_one_line(recipe, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "dataset.json").write_text(json.dumps({"format": 1, "recipe": {"length": 1}}))
    for arguments, code, sentence in (
        (("collect", "--recipe", recipe, "--out", shards), 1, "holds shards of another recipe"),
        (("collect", "--recipe", recipe, "--out", tmp_path / "s", "--text", "/no"), 1, "'/no' does not exist"),
        (("collect", "--recipe", "/nowhere.yaml", "--out", shards), 2, "'/nowhere.yaml' does not exist"),
        (("evaluate", "--gates", "/nowhere", "--data", shards, "--out", shards), 1, "'/nowhere' does not exist"),
        (("export", "--gates", tmp_path, "--out", shards), 1, "has no smartkv_config.json"),
    ):
        result = call(*arguments)
        assert result.exit_code == code and sentence in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_an_installed_package_says_what_training_needs(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None if name == "training" else find(name))
        result = call("collect", "--out", tmp_path / "s")
    assert result.exit_code == 1 and "training is part of the source" in result.stderr
    for name in ("training.collect", "tqdm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    result = call("collect", "--out", tmp_path / "s")
    assert result.exit_code == 1 and 'tqdm is missing: pip install "smartkv-ext[train]"' in result.stderr
