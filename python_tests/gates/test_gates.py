"""Gates: scores as the reference says, files that say what is wrong with them, models that are not theirs."""

import json
import shutil

import pytest
import torch
from gates.make_gates import facts, random_gates
from hf.tiny import tiny
from safetensors.torch import load_file, save_file

from smartkv_ext import reference
from smartkv_ext.gates import Gates, ModelFacts, key_sketch, shipped_gates
from smartkv_ext.gates.lookup import FOLDER
from smartkv_ext.gates.model import sketch_cosine
from smartkv_ext.hf.gate_check import sketch_of


@pytest.fixture
def folder(tmp_path):
    model = tiny("qwen2")
    gates = random_gates(
        ModelFacts.from_config(model.config), sketch=sketch_of(model), quantiles=torch.linspace(-8, 0, 257),
        info={"base_model": "tiny"},
    )  # fmt: skip
    gates.save_pretrained(tmp_path / "gates")
    return tmp_path / "gates"


@pytest.mark.parametrize("hidden", [(16,), (32, 32)])
@pytest.mark.parametrize("inputs", ["key", "key_value"])
def test_scores_equal_the_reference(hidden, inputs):
    gates = random_gates(hidden=hidden, inputs=inputs)
    keys, values = torch.randn(2, 4, 1, 2, 9, 64)
    x = torch.cat([keys, values], -1) if inputs == "key_value" else keys
    want = reference.gate_score(list(x), gates.weights, gates.biases)
    torch.testing.assert_close(gates.score(list(keys), list(values)), want, rtol=2e-2, atol=2e-2)
    some = gates.score(list(keys[1:3, :, 1:]), list(values[1:3, :, 1:]), first_layer=1, first_head=1)
    torch.testing.assert_close(some, want[1:3, :, 1:], rtol=2e-2, atol=2e-2)


def test_a_saved_file_is_the_same_gates(folder):
    again = Gates.from_pretrained(folder)
    made = random_gates(again.model)
    for a, b in zip((*made.weights, *made.biases), (*again.weights, *again.biases), strict=True):
        assert torch.equal(a, b)
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "weights and configuration are for the same readers"
    assert again.info == {"base_model": "tiny"} and again.source == str(folder)
    assert again.threshold(0.25) == pytest.approx(-2.0) and again.threshold(1.0) == -8


def test_thresholds_that_cannot_be():
    gates = random_gates()
    with pytest.raises(ValueError, match="no quantiles"):
        gates.threshold(0.5)
    with pytest.raises(ValueError, match=r"retention must lie in \(0, 1\]; got 0"):
        gates.threshold(0)
    with pytest.raises(ValueError, match="no calibration"):
        gates.probability_score(0.1)
    calibration = torch.stack([torch.full((4, 2), 2.0), torch.arange(8.0).view(4, 2)], -1)
    calibrated = random_gates(calibration=calibration)
    assert torch.allclose(calibrated.probability_score(0.1)[1], (-2.1972 - torch.tensor([2.0, 3.0])) / 2, atol=1e-3)
    with pytest.raises(ValueError, match="quantiles must not fall"):
        random_gates(quantiles=torch.linspace(0, -10, 257))
    with pytest.raises(ValueError, match="decay must be at least 0"):
        random_gates(decay=-torch.ones(4, 2))
    with pytest.raises(ValueError, match="slopes above 0"):
        random_gates(calibration=-calibration)


@pytest.mark.parametrize("shares", [[-1.0, 3.0, 1.0, 1.0], [0.0] * 4, [4.0] * 4])
def test_shares_that_would_break_the_budget_are_refused(shares):
    with pytest.raises(ValueError, match="layer_shares must be at least 0 and average 1"):
        random_gates(layer_shares=torch.tensor(shares))


def edit_config(**changes):
    def damage(folder):
        path = folder / "smartkv_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def truncate(folder):
    path = folder / "smartkv_gates.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def foreign(folder):
    (folder / "smartkv_gates.safetensors").write_bytes(b"PK\x03\x04 not this")


def other_shape(folder):
    path = folder / "smartkv_gates.safetensors"
    save_file(load_file(path) | {"weight.0": torch.zeros(4, 2, 8, 64)}, path)


def not_finite(name):
    def damage(folder):
        path = folder / "smartkv_gates.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[0] = torch.nan
        save_file(tensors, path)

    return damage


def of_whole_numbers(folder):
    path = folder / "smartkv_gates.safetensors"
    save_file({name: x.int() for name, x in load_file(path).items()}, path)


def change_a_bit(folder):
    """Of a weight: the file is well-formed and all its numbers are finite."""
    path = folder / "smartkv_gates.safetensors"
    content = bytearray(path.read_bytes())
    content[-1001] ^= 1
    path.write_bytes(content)


def flip_bytes(folder):
    """A header that claims more than there is."""
    path = folder / "smartkv_gates.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)


def empty(folder):
    (folder / "smartkv_gates.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (truncate, "is damaged or not a safetensors file"),
        (foreign, "is damaged or not a safetensors file"),
        (other_shape, "does not belong to its smartkv_config.json"),
        (flip_bytes, "is damaged or not a safetensors file"),
        (empty, "is damaged or not a safetensors file"),
        (not_finite("bias.0"), "must be finite numbers"),
        (not_finite("sketch"), "sketch must be finite numbers"),
        (not_finite("quantiles"), "quantiles must be finite numbers"),
        (edit_config(format_version="1"), "has format_version '1'; this"),
        (edit_config(format_version=0), "has format_version 0; this"),
        (edit_config(format_version=2), "has format_version 2; this smartkv_ext reads up to 1"),
        (edit_config(smartkv_type="adapter"), "does not describe gates"),
        (edit_config(kind="huge"), "kind must be one of compact, regression, binary; got 'huge'"),
        (edit_config(model={"num_layers": 4}), "the model's facts must be"),
        (edit_config(linear_layers=3), "linear_layers is 3, weights are there for 2"),
        (edit_config(info=["x"]), "info must be a mapping; got list"),
        (of_whole_numbers, "must be floating-point; got torch.int32"),
        (change_a_bit, "is not as it was saved (sha256)"),
        (lambda f: (f / "smartkv_config.json").write_text("{"), "is damaged: it is not JSON"),
        (edit_config(shapes=None), "does not belong to its smartkv_config.json"),
        (lambda f: (f / "smartkv_config.json").unlink(), "has no smartkv_config.json"),
        (lambda f: (f / "smartkv_gates.safetensors").unlink(), "has no smartkv_gates.safetensors"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(ValueError) as caught:
        Gates.from_pretrained(folder)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_gates_know_their_model(folder):
    gates = Gates.from_pretrained(folder)
    gates.check_model(facts())
    with pytest.raises(ValueError, match="this one has num_layers 6, not 4; vocab_size 7, not 98"):
        gates.check_model(facts(layers=6, vocab_size=7))
    gates.check_sketch(sketch_of(tiny("qwen2").bfloat16()))
    with pytest.raises(ValueError, match="another model of the same shape"):
        gates.check_sketch(sketch_of(tiny("qwen2", seed=5)))


def test_sketches_see_through_noise_and_tell_models_apart():
    weights = [torch.randn(128, 96, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    sketch = key_sketch(weights)
    assert sketch_cosine(sketch, key_sketch([w + 0.1 * torch.randn_like(w) for w in weights])) > 0.95
    others = [torch.randn(128, 96, generator=torch.Generator().manual_seed(i)) for i in range(20, 32)]
    assert abs(sketch_cosine(sketch, key_sketch(others))) < 0.5
    assert sketch_cosine(sketch, key_sketch(weights[:5])) == 0


def test_a_model_without_shipped_gates_is_told_so():
    with pytest.raises(ValueError, match="no gates for this model come with the package"):
        shipped_gates(facts())


@pytest.mark.parametrize("folder", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_shipped_gates_are_whole_and_found_by_their_model(folder):
    gates = Gates.from_pretrained(folder)
    assert shipped_gates(gates.model).source == str(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    assert all(x is not None for x in (gates.sketch, gates.decay, gates.quantiles, gates.calibration))
    assert (gates.quantiles.diff() >= 0).all() and (gates.decay >= 0).all()
    assert "/" not in json.dumps(gates.info), "no path of the machine that trained them"
