"""From text to gates: targets by the textbook, data that does not depend on who makes it, gates that have learned."""

import csv
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hf.tiny import write_model
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from smartkv_ext.gates import Gates
from smartkv_ext.gates.lookup import FOLDER
from training import collect, targets
from training.collect import collect_shards, plan
from training.dataset import TokenSet
from training.decay import measure_decay
from training.evaluate import calibration_error, evaluate_gates, platt, scores_of
from training.explore import explore
from training.export import export_gates
from training.pipeline import run
from training.recipe import RECIPES, Recipe
from training.stacked import StackedGates, hidden_widths
from training.texts import Mixture
from training.train import Trainer, train_gates

TEXT = "\n\n".join(
    f"Chapter {i}. The number {i * 7919} was written on door {i * i}; nobody read it." for i in range(300)
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    write_model(folder / "model", TEXT)
    (folder / "books").mkdir()
    for i in range(4):
        (folder / "books" / f"{i}.txt").write_text(TEXT[i * 3000 :])
    return Recipe(
        model=str(folder / "model"), dtype="float32", sources={str(folder / "books"): 1.0}, length=48, tokens=1,
        target="recon_sum", hidden=True, values=True, horizon=32, threshold=0.02, epochs=4, batch=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    assert collect_shards(recipe, folder, quiet=True) == 0
    return folder


def test_targets_equal_dense_attention(monkeypatch):
    monkeypatch.setattr(targets, "BLOCK", 17)
    monkeypatch.setattr(targets, "HORIZONS", (5, 20))
    names = [f"future_{kind}_{h}" for h in (5, 20) for kind in ("max", "sum")]
    monkeypatch.setattr(targets, "TARGETS", ("recon_max", "recon_sum", *names, "lifespan", "value_norm"))
    torch.manual_seed(0)
    length, request, heads, group, head_dim = 60, 7, 2, 3, 16
    n = 2 * length + request
    q, k = torch.randn(heads * group, n, head_dim) * 2, torch.randn(heads, n, head_dim)
    found = targets.attention_targets(q, k, 0.25, length)
    scores = q.view(heads, group, n, head_dim) @ k[:, None].transpose(2, 3) * 0.25
    p = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[..., :length]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    want = {"recon_max": p[:, :, -length:].amax((1, 2)), "recon_sum": p[:, :, -length:].sum((1, 2))}
    for h in (5, 20):
        late = p[:, :, :length] * (distance > h)
        want |= {f"future_max_{h}": late.amax((1, 2)), f"future_sum_{h}": late.sum((1, 2))}
    for name, x in want.items():
        torch.testing.assert_close(found[name].float(), x.log().clamp(min=targets.LOG_FLOOR), rtol=2e-3, atol=2e-3)
    last = torch.where(p[:, :, :length].amax(1) > targets.SIGNIFICANT, distance, 0).amax(1)
    torch.testing.assert_close(4 ** found["lifespan"].float() - 1, last.float(), rtol=1e-2, atol=1e-2)


def test_value_norms_are_those_of_the_output_projection():
    torch.manual_seed(0)
    kv_heads, group, head_dim, hidden, n = 2, 3, 8, 20, 11
    projection = torch.nn.Linear(kv_heads * group * head_dim, hidden, bias=False)
    q, v = torch.randn(1, kv_heads * group, n, head_dim), torch.randn(1, kv_heads, n, head_dim)
    residual = torch.randn(1, n, hidden)
    call = SimpleNamespace(module=SimpleNamespace(o_proj=projection), q=q, v=v, residual=residual)
    for kv_head, found in enumerate(targets.value_norms(call, n - 2)):
        squares = []
        for head in range(kv_head * group, (kv_head + 1) * group):
            alone = torch.zeros(n, kv_heads * group * head_dim)
            alone[:, head * head_dim : (head + 1) * head_dim] = v[0, kv_head]
            squares.append(projection(alone).square().sum(-1))
        want = (torch.stack(squares).mean(0).sqrt() / residual[0].norm(dim=-1)).log()[: n - 2]
        torch.testing.assert_close(found.float(), want, rtol=2e-3, atol=2e-3)


def test_shards_are_the_same_whoever_makes_them(recipe, shards, tmp_path, monkeypatch):
    assert {p.name for p in shards.glob("*.safetensors")} == {
        *(f"train-{i:05d}.safetensors" for i in range(9)), "valid-00009.safetensors",
    }  # fmt: skip
    assert collect_shards(recipe, shards, quiet=True) == 0, "nothing is left to do"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert collect_shards(recipe, tmp_path, quiet=True) == 0
    made = sorted(tmp_path.glob("*.safetensors"))
    assert [p.name[6:11] for p in made] == ["00001", "00003", "00005", "00007", "00009"]
    for path in made[-2:]:
        mine, theirs = load_file(path), load_file(shards / path.name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="shards of another recipe"):
        collect_shards(replace(recipe, seed=7), tmp_path, quiet=True)


def test_a_finished_run_takes_no_other_text(recipe, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "gates").mkdir()
    other = tmp_path / "other.txt"
    other.write_text(TEXT)
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    for changed in (replace(recipe, sources={str(other): 1.0}), replace(recipe, length=40)):
        with pytest.raises(ValueError, match="shards of another recipe: name another folder with --out"):
            run(changed, tmp_path, quiet=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == before
    assert not (tmp_path / "training").exists() and not list((tmp_path / "gates").iterdir())
    with pytest.raises(ValueError, match="valid_share must be below 1 to train"):
        run(replace(recipe, valid_share=1.0), tmp_path / "judge", quiet=True)
    assert not (tmp_path / "judge").exists()


def test_a_data_set_grows(recipe, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "grown")
    more, old = replace(recipe, tokens=11 * 8 * recipe.length), shards / "train-00004.safetensors"
    assert collect_shards(more, tmp_path / "grown", quiet=True) == 0
    added = {p.name for p in (tmp_path / "grown").iterdir()} - {p.name for p in shards.iterdir()}
    assert added == {"train-00010.safetensors"}, "what was there is not made again"
    assert (tmp_path / "grown" / old.name).read_bytes() == old.read_bytes()
    tokens = [json.loads((f / "dataset.json").read_text())["recipe"]["tokens"] for f in (shards, tmp_path / "grown")]
    assert tokens == [recipe.tokens, more.tokens]
    assert collect_shards(recipe, tmp_path / "grown", quiet=True) == 0, "a smaller order is filled already"


def test_a_shard_holds_the_keys_of_the_model(recipe, shards):
    model, tokenizer = collect.load(recipe.model, "float32")
    tensors = load_file(shards / "train-00003.safetensors")
    assert tensors["keys"].shape == (2, 1, 8 * 44, 64) == tensors["values"].shape
    assert tensors["hidden"].shape == (2, 1, 8 * 44, 128)
    texts = Mixture.read(recipe.sources, "train", recipe.valid_share)
    text, document = texts.bundled(recipe.length).piece(tokenizer, f"{recipe.seed}/3/5", recipe.length)
    keys = []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _m, _a, out: keys.append(out[0]))
    with torch.no_grad():
        model(text[None])
    here = tensors["pieces"] == 5
    positions = tensors["positions"][here].long()
    assert (tensors["documents"][here] == document.number).all() and (tensors["documents"] != document.number).any()
    torch.testing.assert_close(tensors["keys"][1, 0, here], keys[0][positions], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["compact", "regression", "binary"])
def test_folding_changes_nothing(kind):
    generator = torch.Generator().manual_seed(0)
    mean = 300 * torch.randn(6, 64, generator=generator)  # keys may have huge biases
    std = 1 + torch.rand(6, 64, generator=generator)
    x = mean[:, None] + std[:, None] * torch.randn(6, 50, 64, generator=generator)
    out_mean, out_std = torch.randn(6, generator=generator), 1 + torch.rand(6, generator=generator)
    stacked = StackedGates(mean, std, out_mean, out_std, hidden_widths(kind, 64, None), generator)
    with torch.no_grad():
        want = stacked(x) * out_std[:, None] + out_mean[:, None]
    weights, biases = stacked.folded((3, 2))
    y = x
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        y = y @ w.flatten(0, 1).transpose(1, 2) + b.flatten(0, 1)[:, None]
        y = y.relu() if i + 1 < len(weights) else y
    assert (y[..., 0] - want).abs().mean() < 0.02 * want.std(), "only rounding to bfloat16 is left"


def learnable(recipe, shards):
    """The shards with targets that the key decides, and other keys than a random model's."""
    sets = [TokenSet.load(shards, split, ["recon_sum", "future_max_32", "value_norm"]) for split in ("train", "valid")]
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(len(sets[0].inputs), 64, 1, generator=generator)
    for tokens in sets:
        tokens.inputs = torch.randn(tokens.inputs.shape, generator=generator) * 3 + 40
        score = ((tokens.inputs - 40) @ direction)[..., 0] / 24
        tokens.targets["recon_sum"] = score.abs() - 4
        tokens.targets["future_max_32"] = torch.where(score.abs() > 1.5, -1.0, -8.0)
    return sets


@pytest.mark.parametrize("kind", ["compact", "binary"])
def test_gates_learn_what_a_key_says_and_a_stopped_run_goes_on(recipe, shards, tmp_path, kind):
    chosen = replace(
        recipe, kind=kind, target="recon_sum" if kind == "compact" else "future_max_32", hidden_size=16, epochs=8,
        learning_rate=0.02, threshold=0.05,
    )  # fmt: skip
    sets = learnable(chosen, shards)
    if kind == "binary":
        for tokens in sets:
            tokens.usable = lambda _recipe, n=tokens.count: torch.ones(n, dtype=torch.bool)
    whole = Trainer(chosen, *sets, tmp_path / "whole")
    start = whole.losses().mean()
    whole.fit(quiet=True)
    assert whole.best.mean() < (0.3 if kind == "compact" else 0.6) * start
    first = Trainer(chosen, *sets, tmp_path / "stopped")
    step = first._log

    def log_and_stop(row):
        step(row)
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    first._log = log_and_stop
    with pytest.raises(KeyboardInterrupt):
        first.fit(quiet=True)
    again = Trainer(chosen, *sets, tmp_path / "stopped")
    again.fit(quiet=True)
    assert torch.allclose(again.best, whole.best, rtol=1e-4)
    with open(tmp_path / "stopped" / "loss.csv") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, whole.epoch + 1))


def test_binary_gates_stop_early_by_their_auc(recipe, shards, tmp_path):
    chosen = replace(recipe, kind="binary", target="future_max_32", hidden_size=16)
    sets = learnable(chosen, shards)
    for tokens in sets:
        tokens.usable = lambda _recipe, n=tokens.count: torch.ones(n, dtype=torch.bool)
    sets[1].targets["future_max_32"][1] = -8.0  # a head without positives
    trainer = Trainer(chosen, *sets, tmp_path)
    out, label = trainer.outputs(trainer.valid_inputs), trainer.valid_target > 0
    assert 0 < label[0].float().mean() < 0.3
    alone = torch.nn.functional.softplus(out[1]).mean().item()  # its positives are none: the loss itself
    assert trainer.losses().tolist() == pytest.approx([1 - roc_auc_score(label[0], out[0]), alone])


def test_a_checkpoint_of_other_data_is_left_behind(recipe, shards, tmp_path):
    chosen, sets = replace(recipe, epochs=1), learnable(recipe, shards)
    Trainer(chosen, *sets, tmp_path).fit(quiet=True)
    sets[0].targets["recon_sum"] = -sets[0].targets["recon_sum"]
    other = Trainer(chosen, *sets, tmp_path)
    other._resume()
    assert other.epoch == 0
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"checkpoint .* is damaged: delete it and train again"):
        other.fit(quiet=True)


def test_probabilities_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, generator=generator)
    labels = (torch.rand(20_000, generator=generator) < torch.sigmoid(2 * scores - 3)).numpy()
    slope, offset = platt(scores.numpy(), labels)
    assert slope == pytest.approx(2, rel=0.1) and offset == pytest.approx(-3, rel=0.1)
    p = torch.sigmoid(slope * scores + offset).numpy()
    assert calibration_error(p, labels) < 0.01 < calibration_error(torch.sigmoid(scores).numpy(), labels)
    for one, rate in ((labels & False, 0), (labels | True, 1), (labels[:0], 0.5)):
        slope, offset = platt(scores.numpy()[: len(one)], one)
        assert slope > 0 and float(torch.sigmoid(slope * scores + offset).mean()) == pytest.approx(rate, abs=0.01)


def test_the_whole_way(recipe, tmp_path):
    result = run(replace(recipe, hidden=False, values=False), tmp_path, quiet=True)
    made = Gates.from_pretrained(result["gates"])
    assert made.num_parameters == 2 * (64 * 16 + 16 + 16 + 1) == result["parameters"]
    assert made.calibration is not None and made.quantiles is not None and made.sketch is not None
    assert made.info["calibrated"] == {"horizon": recipe.horizon, "threshold": recipe.threshold}
    assert recipe.model not in json.dumps(made.info) and "recipe" not in made.info, "no path of this machine"
    written = {path.name for path in (tmp_path / "evaluation").iterdir()}
    assert written == {"summary.json", "sensitivity_specificity.csv", "roc.png", "calibration.png", "heads.png",
                       "confusion_0.5.png", "confusion_0.1.png", "loss.png"}  # fmt: skip
    with open(tmp_path / "evaluation" / "sensitivity_specificity.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and {"auc", "f1", "sensitivity_0.1", "specificity_0.5", "retention_0.2"} <= set(rows[0])
    assert set(run(recipe_of(tmp_path), tmp_path, quiet=True)["seconds"]) == {"collect", "train", "evaluate", "export"}


def recipe_of(folder):
    """The recipe of a run's gates."""
    return Recipe(**Gates.from_pretrained(folder / "training").info["recipe"])


def test_what_gates_cannot_be_evaluated_on(recipe, shards, tmp_path):
    made = train_gates(replace(recipe, epochs=1), shards, tmp_path / "gates", quiet=True)
    shutil.copytree(shards, tmp_path / "shards")
    facts = tmp_path / "shards" / "dataset.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"num_layers": 3}))
    with pytest.raises(ValueError, match="of another model: num_layers is 3, the gates' is 2"):
        evaluate_gates(tmp_path / "gates", tmp_path / "shards", tmp_path / "e")
    made.info = {}
    made.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="name the folder 'training' of their run"):
        evaluate_gates(tmp_path / "bare", shards, tmp_path / "e")


def test_only_held_out_text_calibrates_and_only_when_asked_to_twice(recipe, shards, tmp_path):
    train_gates(replace(recipe, epochs=1), shards, tmp_path / "gates", quiet=True)
    evaluate_gates(tmp_path / "gates", shards, tmp_path / "train", "train")
    assert Gates.from_pretrained(tmp_path / "gates").calibration is None
    assert evaluate_gates(tmp_path / "gates", shards, tmp_path / "valid")["calibration written"]
    first = Gates.from_pretrained(tmp_path / "gates")
    assert first.info["calibrated"] == {"horizon": 32, "threshold": recipe.threshold}
    again = evaluate_gates(tmp_path / "gates", shards, tmp_path / "valid", threshold=0.05)
    assert not again["calibration written"] and again["threshold"] == 0.05
    assert torch.equal(Gates.from_pretrained(tmp_path / "gates").calibration, first.calibration)
    evaluate_gates(tmp_path / "gates", shards, tmp_path / "valid", threshold=0.05, calibrate=True)
    assert not torch.equal(Gates.from_pretrained(tmp_path / "gates").calibration, first.calibration)
    assert evaluate_gates(tmp_path / "gates", shards, tmp_path / "valid")["threshold"] == 0.05, "as calibrated"


def test_gates_of_keys_and_values(recipe, shards, tmp_path):
    chosen = replace(recipe, inputs="key_value", weighted=True, loss="huber", epochs=1)
    made = train_gates(chosen, shards, tmp_path / "gates", quiet=True)
    assert made.input_size == 128
    made.quantiles = None
    made.save_pretrained(tmp_path / "gates")
    evaluate_gates(tmp_path / "gates", shards, tmp_path / "evaluation")
    calibrated, tokens = Gates.from_pretrained(tmp_path / "gates"), TokenSet.load(shards, "valid", [], "key_value")
    reached = (scores_of(calibrated, tokens) >= calibrated.threshold(0.3)).float().mean()
    assert reached == pytest.approx(0.3, abs=0.01)
    assert export_gates(tmp_path / "gates", tmp_path / "out").inputs == "key_value"
    some = train_gates(chosen, shards, tmp_path / "some", quiet=True, shards=3)
    assert 3 * made.info["tokens"] == 9 * some.info["tokens"]


def test_only_gates_of_the_package_must_be_small(tmp_path, monkeypatch):
    monkeypatch.setattr("training.export.MAX_BYTES", 100_000)
    gates = FOLDER / "smollm2-135m-instruct"
    assert export_gates(gates, tmp_path / "own").num_bytes > 100_000
    monkeypatch.setattr("training.export.FOLDER", tmp_path)
    with pytest.raises(ValueError, match="at most 100,000 bytes to ship"):
        export_gates(gates, tmp_path / "shipped")


def test_decay_is_found_again(shards, monkeypatch):
    tokens = TokenSet.load(shards, "train", ["future_sum_32", "future_sum_256"])
    tokens.length, tokens.positions = 1024, torch.full_like(tokens.positions, 24)
    distance = torch.arange(1000)
    for r in (0.3, 1.7):
        p = ((distance + 64) / 64) ** -r
        tokens.targets = {f"future_sum_{h}": p[h:].sum().log().expand(2, tokens.count) for h in (32, 256)}
        monkeypatch.setattr(TokenSet, "load", lambda *_: tokens)
        assert torch.allclose(measure_decay(shards), torch.full((2,), r), atol=0.01)


def test_attention_shares_add_up(recipe, tmp_path):
    rows = explore(recipe, tmp_path, pieces=1, quiet=True)
    assert len(rows) == 2 and (tmp_path / "heads.png").stat().st_size > 1000
    for row in rows:
        assert 0 <= row["sinks"] <= 1 - row["local"] <= 1 and 0 <= row["late"] <= 1 and row["key_norm"] > 0


def test_recipes_say_what_is_wrong(tmp_path):
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert len(names) == 10 and all(plan(Recipe.load(collect.Path(name))) for name in names)
    assert Recipe.load(collect.Path("small")) == Recipe(), "what a recipe leaves out is as in the small one"
    base, other = (Recipe.load(collect.Path(name)) for name in ("qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b-binary"))
    assert other.kind == "binary" and other.data() == base.data(), "trained on the same shards"
    for text, sentence in (
        ("kind: huge", "kind must be one of compact, regression, binary; got 'huge'"),
        ("bananas: 1", r"got \['bananas'\]"),
        ("[1", "is not YAML"),
        ("like: nothing", "recipe 'nothing' does not exist"),
        (f"like: {tmp_path}/r.yaml", "is like too many others"),
        ("epochs: 0", "epochs must be at least 1; got 0"),
        ("epochs: many", "epochs must be int; got 'many'"),
        ("learning_rate: fast", "learning_rate must be float; got 'fast'"),
        ("learning_rate: 0", "learning_rate must be above 0; got 0"),
        ("threshold: 0", r"threshold must lie in \(0, 1\); got 0"),
        ("target: recon_summ", "target must be one of recon_max, .*; got 'recon_summ'"),
        ("kind: binary", "target of binary gates must be future_max_256, as their horizon says; got 'recon_sum'"),
        ("{kind: binary, target: future_max_256, horizon: 32}", "must be future_max_32, .*; got 'future_max_256'"),
        ("horizon: 100", "horizon must be one of 32, 256; got 100"),
    ):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            Recipe.load(path)
    path.write_text("learning_rate: 5e-3")
    assert Recipe.load(path).learning_rate == 0.005
    with pytest.raises(ValueError, match=r"none.yaml' does not exist: name a YAML file, or one of qwen"):
        Recipe.load(tmp_path / "none.yaml")


def test_a_damaged_shard_is_named(shards, tmp_path):
    whole = shards / "valid-00009.safetensors"
    (tmp_path / "dataset.json").write_bytes((shards / "dataset.json").read_bytes())
    (tmp_path / whole.name).write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"valid-00009.safetensors' is damaged: delete it and collect again"):
        TokenSet.load(tmp_path, "valid", ["recon_sum"])
