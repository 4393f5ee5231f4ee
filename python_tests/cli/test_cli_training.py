"""explore, collect, train, evaluate, export by the command line."""

import importlib.util
import json
import shlex
import shutil
import sys

import pytest
import torch
import typer
import yaml
from cli_runner import DOCUMENT, call
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from smartkv_ext.gates import Gates
from training import key_basis, layer_shares
from training.recipe import Recipe


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
    exported = call("evaluate", "--gates", run / "gates", "--data", run / "shards", "--out", tmp_path / "e", "--json")
    assert exported.exit_code == 0 and json.loads(exported.stdout)["horizon"] == 32, exported.output
    nowhere = call("evaluate", "--gates", run / "gates", "--data", tmp_path / "no", "--out", tmp_path / "e")
    assert nowhere.exit_code == 1 and "has no shards of the valid split" in nowhere.stderr
    again = call("collect", "--recipe", recipe, "--out", run / "shards")
    assert again.exit_code == 0 and "is complete" in again.stdout
    result = call(
        "evaluate", "--gates", run / "training", "--data", run / "shards", "--out", tmp_path / "e", "--threshold", 0.2
    )
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["threshold"] == 0.2
    assert len(result.stdout.splitlines()) > 2, "a table comes first"
    result = call("export", "--gates", run / "training", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "parameters" in result.stdout
    result = call("explore", "--recipe", recipe, "--out", tmp_path / "x", "--pieces", 1)
    assert result.exit_code == 0 and (tmp_path / "x" / "heads.csv").is_file()


def test_train_says_how_to_measure_key_basis_and_layer_shares(recipe, tmp_path):
    result = call("train", "--recipe", recipe, "--out", tmp_path / "a run")
    assert result.exit_code == 0, result.output
    first, words = (shlex.split(line) for line in result.stdout.splitlines()[-2:])
    assert first[:3] == ["python", "-m", "training.key_basis"]
    basis = typer.Typer()
    basis.command()(key_basis.main)
    measured = CliRunner().invoke(basis, [*first[3:], "--pieces", "2", "--tokens", "200"])
    assert measured.exit_code == 0, measured.output
    gates = Gates.from_pretrained(tmp_path / "a run" / "gates")
    assert gates.basis is not None and json.loads(measured.stdout.splitlines()[-1])["strength"] == 0.5
    other, model = tmp_path / "other", Recipe.load(recipe).model
    shutil.copytree(model, other)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(other)
    refused = CliRunner().invoke(basis, [*first[3:], "--model", str(other), "--pieces", "2", "--tokens", "200"])
    assert refused.exit_code == 1 and "belong to another model of the same shape" in str(refused.exception)
    assert words[:3] == ["python", "-m", "training.layer_shares"]
    steps = typer.Typer()
    steps.command()(layer_shares.main)
    measured = CliRunner().invoke(steps, [*words[3:], "--tokens", "700", "--future", "16"])
    assert measured.exit_code == 0, measured.output
    assert Gates.from_pretrained(tmp_path / "a run" / "gates").layer_shares.tolist() == pytest.approx(
        json.loads(measured.stdout.splitlines()[-1])["shares"]
    )
    assert Gates.from_pretrained(tmp_path / "a run" / "gates").basis is not None, "one step keeps what the other wrote"
    assert CliRunner().invoke(steps, []).exit_code == 2, "nowhere to write to"


def test_an_interrupted_run_says_how_to_go_on(recipe, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.pipeline.collect_shards", interrupt)
    done = call("train", "--recipe", recipe, "--out", tmp_path)
    assert done.exit_code == 130 and done.stderr == "Interrupted. The same command goes on from here.\n"


def test_what_cannot_be_is_said_in_one_line(recipe, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "dataset.json").write_text(json.dumps({"format": 1, "recipe": {"length": 1}}))
    for arguments, code, sentence in (
        (("collect", "--recipe", recipe, "--out", shards), 1, "holds shards of another recipe"),
        (("collect", "--recipe", recipe, "--out", tmp_path / "s", "--text", "/no"), 1, "'/no' does not exist"),
        (("train", "--small", "--recipe", recipe), 2, "--small is a recipe of its own"),
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
