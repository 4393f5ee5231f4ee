"""What gates cost: the shares are of what was measured."""

import json

import pytest
from gates.make_gates import random_gates
from hf.tiny import write_model
from typer.testing import CliRunner

import bench.gate_cost
from bench.models import load
from smartkv_ext.gates import ModelFacts

TEXT = " ".join(f"Line {i} of the text says {i * i}." for i in range(200))


def test_shares_of_time_and_parameters(tmp_path):
    write_model(tmp_path / "model", TEXT)
    (tmp_path / "text.txt").write_text(TEXT)
    network, _ = load(str(tmp_path / "model"), "float32")
    gates = random_gates(ModelFacts.from_config(network.config))
    gates.save_pretrained(tmp_path / "gates")
    app = bench.gate_cost.typer.Typer()
    app.command()(bench.gate_cost.main)
    options = {"model": "model", "gates": "gates", "text": "text.txt"}
    arguments = [x for name, path in options.items() for x in (f"--{name}", str(tmp_path / path))]
    small = ["--dtype", "float32", "--tokens", "200", "--rounds", "1", "--steps", "2"]
    done = CliRunner().invoke(app, [*arguments, *small], catch_exceptions=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["gates"] == gates.num_parameters == 2 * (64 * 16 + 16 + 16 + 1)
    assert result["share"] == gates.num_parameters / sum(p.numel() for p in network.parameters())
    for row in result["rows"]:
        assert 0 < row["share"] < 1 and row["share"] == pytest.approx(row["gates ms"] / row["model ms"])
