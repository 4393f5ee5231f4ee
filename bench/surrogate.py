"""Compact gates on keys against a KVzap-style surrogate on hidden states: the same data, the same target.

python -m bench.surrogate --data SHARDS --text NOVEL.txt@0.5      shards of a recipe with ``hidden: true``

KVzap (NVIDIA, 2026) predicts the scores of a layer's heads from the layer's attention input: a linear map, or an MLP
hidden_size -> 512 -> heads with GELU. All train for as many epochs and keep their best one by the valid split (gates
per head, the MLP per layer; the linear map is solved exactly). Each scorer decides under one budget, nothing is
quantised, and all decay with age alike, so that only the scores differ. "true target" is what all were trained on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

import smartkv_ext
from bench.models import load
from bench.output import show
from smartkv_ext import SmartKVCache
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import Policy, TokenView
from smartkv_ext.policies.gate import NEAR
from training.collect import Collector
from training.dataset import TokenSet
from training.decay import measure_decay
from training.recipe import Recipe
from training.recording import LayerCall, recording
from training.texts import documents
from training.train import Trainer

HIDDEN = 512  # of KVzap's MLP
BATCH, RATE = 512, 1e-3


@dataclass(frozen=True)
class Table(Policy):
    """Scores that were computed beforehand, less what heads forget with age.

    scores (layers, num_kv_heads, n); decay (layers, num_kv_heads), None: nothing is forgotten.
    """

    name: ClassVar[str] = "table"
    compares_heads: ClassVar[bool] = True
    scores: torch.Tensor | None = None
    decay: torch.Tensor | None = None

    def score(self, view: TokenView) -> torch.Tensor:
        assert self.scores is not None
        index = view.positions.clamp(0, self.scores.shape[2] - 1).long()[:, None]
        found = self.scores[view.layer_idx][None].expand(len(index), -1, -1)
        found = found.gather(2, index.expand(-1, found.shape[1], -1))
        if self.decay is None:
            return found
        fall = torch.log1p((view.seen - view.positions[:, None]) / NEAR)
        return found - self.decay[view.layer_idx][:, None] * fall


Tokens = tuple[torch.Tensor, torch.Tensor]  # of a layer: hidden (n, hidden_size) and target (n, num_kv_heads), float32


def surrogate(width: int, heads: int, mlp: bool) -> nn.Module:
    """An untrained scorer of one layer."""
    if not mlp:
        return nn.Linear(width, heads)
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, heads))


def linear_surrogate(hidden: torch.Tensor, target: torch.Tensor) -> nn.Module:
    """Ridge regression of one layer in closed form, on standardised tokens."""
    linear = nn.Linear(hidden.shape[1], target.shape[1])
    gram = hidden.T @ hidden + 1e-2 * len(hidden) * torch.eye(hidden.shape[1])
    linear.weight.data = torch.linalg.solve(gram, hidden.T @ target).T
    linear.bias.data.zero_()
    return linear


def mlp_surrogate(train: Tokens, valid: Tokens, epochs: int) -> nn.Module:
    """KVzap's MLP of one layer on standardised tokens, at its best epoch."""
    torch.manual_seed(0)
    hidden, target = train
    model = surrogate(hidden.shape[1], target.shape[1], mlp=True)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    least, best = torch.inf, model.state_dict()
    for _ in range(epochs):
        for index in torch.randperm(len(hidden)).split(BATCH):
            optimizer.zero_grad()
            (model(hidden[index]) - target[index]).square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            loss = (model(valid[0]) - valid[1]).square().mean().item()
        if loss < least:
            least, best = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return model


class Surrogates(nn.Module):
    """KVzap's scorers of all layers. ``inputs`` and ``outputs``: means and standard deviations (layers, 2, size)."""

    def __init__(self, layers: int, width: int, heads: int, mlp: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(surrogate(width, heads, mlp) for _ in range(layers))
        self.inputs, self.outputs = (nn.Buffer(torch.zeros(layers, 2, size)) for size in (width, heads))
        self.unexplained = nn.Buffer(torch.zeros(layers))

    @property
    def r2(self) -> float:
        """On the valid split, mean over layers."""
        return 1 - self.unexplained.mean().item()

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def fit(self, i: int, train: Tokens, valid: Tokens, epochs: int) -> None:
        """Train layer ``i``; 0 epochs: the linear map."""
        for place, x in ((self.inputs, train[0]), (self.outputs, train[1])):
            place[i] = torch.stack([x.mean(0), x.std(0).clamp(min=1e-3)])
        (mean, std), (y_mean, y_std) = self.inputs[i], self.outputs[i]
        known, held_out = (((x - mean) / std, (y - y_mean) / y_std) for x, y in (train, valid))
        self.layers[i] = mlp_surrogate(known, held_out, epochs) if epochs else linear_surrogate(*known)
        self.unexplained[i] = ((self.of_layer(i, valid[0]).T - valid[1]) / y_std).square().mean()

    @torch.no_grad()
    def of_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """(num_kv_heads, n) scores of hidden (n, hidden_size)."""
        (mean, std), (y_mean, y_std) = self.inputs[layer], self.outputs[layer]
        found: torch.Tensor = (self.layers[layer]((hidden.float() - mean) / std) * y_std + y_mean).T
        return found

    def scores(self, calls: list[LayerCall]) -> torch.Tensor:
        return torch.stack([self.of_layer(i, call.hidden[0]) for i, call in enumerate(calls)])


def trained_surrogates(data: Path, target: str, epochs: int, file: Path) -> Surrogates:
    """Scorers of a data set, or those that an earlier call of the same kind left in ``file``; 0 epochs: linear."""
    train, valid = (TokenSet.load(data, split, [target], "hidden") for split in ("train", "valid"))
    layers, tokens, width = train.inputs.shape
    heads = train.targets[target].shape[0] // layers
    made = Surrogates(layers, width, heads, epochs > 0)
    settings = {"data": str(data), "tokens": str(tokens), "target": target, "epochs": str(epochs)}
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            if opened.metadata() == settings:
                made.load_state_dict(load_file(file))
                return made
    for i in range(layers):  # a float32 copy of all layers is large
        mine = slice(i * heads, (i + 1) * heads)
        parts = [(x.inputs[i].float(), x.targets[target][mine].T) for x in (train, valid)]
        made.fit(i, parts[0], parts[1], epochs)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in made.state_dict().items()}, file, settings)
    return made


class CompactGates:
    """Our gates, trained by training.train on the same shards."""

    def __init__(self, data: Path, recipe: Recipe, folder: Path) -> None:
        sets = [TokenSet.load(data, split, [recipe.target], recipe.inputs) for split in ("train", "valid")]
        self.trainer = Trainer(recipe, *sets, folder)
        self.trainer.fit(quiet=True)
        self.r2 = 1 - self.trainer.best.mean().item()
        self.num_parameters = sum(p.numel() for p in self.trainer.model.parameters())
        self.recipe = recipe

    def scores(self, calls: list[LayerCall]) -> torch.Tensor:
        keys = torch.stack([call.pre_rope[0] for call in calls])
        if self.recipe.inputs == "key_value":
            keys = torch.cat([keys, torch.stack([call.v[0] for call in calls])], -1)
        return self.trainer.outputs(keys.flatten(0, 1)).unflatten(0, keys.shape[:2])


@torch.no_grad()
def continued(network: Any, ids: torch.Tensor, prefill: int, cache: Any) -> tuple[torch.Tensor, Any]:
    """Log-probabilities (n, vocabulary) of the tokens after ``prefill``, and what the cache reported before them."""
    network(ids[:, :prefill], **cache_kwargs(cache), logits_to_keep=1)
    report = cache.report() if isinstance(cache, SmartKVCache) else None
    return network(ids[:, prefill:], **cache_kwargs(cache)).logits[0].float().log_softmax(-1), report


def main(
    data: Annotated[Path, typer.Option(help="shards with hidden states")],
    text: Annotated[list[str], typer.Option(help="held-out FILE or FILE@0.5-1; repeatable; none: only train")] = [],  # noqa: B006
    work: Annotated[Path, typer.Option(help="folder that keeps what was trained")] = Path("runs/surrogate"),
    model: str = "smollm2",
    dtype: str = "bfloat16",
    target: str = "recon_sum",
    prefill: int = 2048,
    tokens: int = 256,
    budget: float = 0.25,
    epochs: Annotated[int, typer.Option(min=1, help="of every scorer that has any")] = 20,
) -> None:
    """Print a row per scorer; last line JSON."""
    compact = Recipe(target=target, epochs=epochs, patience=epochs)
    scorers: dict[str, Any] = {
        "compact gate": CompactGates(data, compact, work / "compact"),
        "compact gate, key and value": CompactGates(data, replace(compact, inputs="key_value"), work / "values"),
        "gate of 64": CompactGates(data, replace(compact, kind="regression"), work / "wide"),
        "KVzap-style linear": trained_surrogates(data, target, 0, work / "linear.safetensors"),
        "KVzap-style MLP": trained_surrogates(data, target, epochs, work / "mlp.safetensors"),
    }
    for name, scorer in scorers.items():
        typer.echo(f"{name}: {scorer.num_parameters:,} parameters, R2 {scorer.r2:.3f}", err=True)
    if not text:
        return
    network, tokenizer = load(model, dtype)
    config = network.config
    decay = measure_decay(data).unflatten(0, (config.num_hidden_layers, config.num_key_value_heads))
    found: dict[str, list[float]] = {name: [] for name in (*scorers, "true target")}
    ratio = 0.0
    for source in text:
        (ids,) = documents(tokenizer, source, 1, prefill + tokens)
        collector = Collector(network, tokenizer, Recipe(length=prefill))
        truth = collector.piece(ids[0, :prefill], torch.arange(prefill))[target].float()
        calls: list[LayerCall] = []
        with torch.no_grad(), recording(network, calls.append):
            network.base_model(ids[:, :prefill], use_cache=False)
        full, _ = continued(network, ids, prefill, DynamicCache())
        for name in found:
            table = truth if name == "true target" else scorers[name].scores(calls)
            cache = SmartKVCache(config, budget, Table(table, decay), tiers=(16,), window=64)
            with smartkv_ext.patch(network):
                ours, report = continued(network, ids, prefill, cache)
            ratio = report.ratio
            found[name].append((full.exp() * (full - ours)).sum(-1).mean().item())
            typer.echo(f"{source} {name}: {found[name][-1]:.4f}", err=True)
    rows = [
        {"scorer": name, "parameters": getattr(scorers.get(name), "num_parameters", None),
         "R2": getattr(scorers.get(name), "r2", None), "KL": sum(kl) / len(kl)}
        for name, kl in found.items()
    ]  # fmt: skip
    title = f"{Path(model).name}: {target}, KL at {100 * ratio:.1f} % of the bytes, nothing quantised"
    show(title, rows, {"rows": rows, "each": found, "ratio": ratio})


if __name__ == "__main__":
    typer.run(main)
