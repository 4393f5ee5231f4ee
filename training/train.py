"""Train the gates of all layers and heads at once.

python -m training.train --recipe smollm2 --data runs/smollm2/shards --out runs/smollm2/gates

Every head keeps the weights of its own best epoch on the valid split. A run that was stopped goes on from
its checkpoint; loss.csv has the log.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from bench.models import load
from smartkv_ext.gates import Gates, ModelFacts
from smartkv_ext.gates.gates import score_quantiles
from smartkv_ext.hf.gate_check import sketch_of

from .dataset import TokenSet, wanted_targets
from .decay import measure_decay
from .recipe import Recipe
from .stacked import StackedGates, hidden_widths

CHECKPOINT = "checkpoint.safetensors"
EVALUATED = 4096  # tokens that go through the gates at a time outside training
HUBER = 1.0  # standard deviations of the target


class Trainer:
    """Adam with a cosine schedule over stacked gates; each head keeps its best epoch."""

    def __init__(self, recipe: Recipe, train: TokenSet, valid: TokenSet, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.inputs, self.target = _select(train, recipe, device)
        self.valid_inputs, self.valid_target = _select(valid, recipe, device)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.binary = recipe.kind == "binary"
        count = self.inputs.shape[0]
        mean, std = _moments(self.inputs)
        out_mean, out_std = torch.zeros(count, device=device), torch.ones(count, device=device)
        if not self.binary:
            out_mean, out_std = self.target.mean(1), self.target.std(1).clamp(min=1e-3)
        head_dim = train.facts["head_dim"]
        widths = hidden_widths(recipe.kind, head_dim, recipe.hidden_size)
        moments = [x.cpu() for x in (mean, std, out_mean, out_std)]  # weights are drawn on the CPU: one seed, one start
        self.model = StackedGates(*moments, widths, self.generator).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), recipe.learning_rate, weight_decay=1e-3)
        self.epoch, self.waited = 0, 0
        self.best = torch.full((count,), torch.inf, device=device)
        self.best_weights = {name: x.detach().clone() for name, x in self.model.named_parameters()}
        if self.binary:
            self.positives = [row.nonzero()[:, 0].cpu() for row in self.target]
            self.negatives = [(row == 0).nonzero()[:, 0].cpu() for row in self.target]

    def fit(self, quiet: bool = False) -> None:
        """Train to the last epoch or until no head gets better, from the checkpoint if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        with tqdm(total=self.recipe.epochs, initial=self.epoch, unit="epoch", disable=quiet) as bar:
            while self.epoch < self.recipe.epochs and self.waited < self.recipe.patience:
                start, rate = time.perf_counter(), self._rate()
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                train = self._epoch()
                losses = self.losses()
                better = losses < self.best
                for name, x in self.model.named_parameters():
                    keep = better.view(-1, *([1] * (x.dim() - 1)))
                    self.best_weights[name] = torch.where(keep, x.detach(), self.best_weights[name])
                gained = bool((losses < 0.999 * self.best).any())
                self.best = torch.minimum(self.best, losses)
                self.waited = 0 if gained else self.waited + 1
                self.epoch += 1
                row = {"epoch": self.epoch, "learning_rate": rate, "train": train, "valid": losses.mean().item(),
                       "best": self.best.mean().item(), "seconds": time.perf_counter() - start}  # fmt: skip
                self._log(row)
                bar.update()
                bar.set_postfix(train=f"{train:.4f}", valid=f"{row['valid']:.4f}")
        for name, x in self.model.named_parameters():
            x.data.copy_(self.best_weights[name])

    def _rate(self) -> float:
        done = torch.tensor(self.epoch / self.recipe.epochs)
        return self.recipe.learning_rate * float(0.02 + 0.98 * (1 + torch.cos(torch.pi * done)) / 2)

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs (heads, batch, width) and targets (heads, batch); binary: half positives, drawn for every head."""
        batch, n = self.recipe.batch, self.inputs.shape[1]
        if self.binary:
            heads = torch.arange(len(self.inputs))[:, None]
            for _ in range(max(n // batch, 1)):
                index = torch.stack([self._balanced(i, batch) for i in range(len(self.inputs))])
                yield self.inputs[heads, index], self.target[heads, index]
            return
        order = torch.randperm(n, generator=self.generator)
        for index in order.split(batch):
            index = index.to(self.inputs.device)
            yield self.inputs[:, index], (self.target[:, index] - self._out("out_mean")) / self._out("out_std")

    def _balanced(self, head: int, batch: int) -> torch.Tensor:
        """Token indices of a head, half of them positive where it has any positives."""
        groups = [g for g in (self.positives[head], self.negatives[head]) if len(g)]
        size = batch // len(groups)
        return torch.cat([g[torch.randint(len(g), (size,), generator=self.generator)] for g in groups])

    def _out(self, name: str) -> torch.Tensor:
        x: torch.Tensor = getattr(self.model, name)
        return x[:, None]

    def _loss(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(heads, n) of every token."""
        if self.binary:
            return nn_bce(out, target)
        if self.recipe.loss == "huber":
            return torch.nn.functional.huber_loss(out, target, reduction="none", delta=HUBER)
        return (out - target).square()

    def _epoch(self) -> float:
        total, steps = 0.0, 0
        for inputs, target in self._batches():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._loss(self.model(inputs), target).mean(1)
            loss.sum().backward()  # type: ignore[no-untyped-call]  # heads do not share a weight
            self.optimizer.step()
            total, steps = total + loss.mean().item(), steps + 1
        return total / steps

    @torch.no_grad()
    def losses(self) -> torch.Tensor:
        """(heads,) on the valid split. Regression: the share of the target's variance that is not explained; binary:
        1 - AUC, which neither the share of positives nor too sure a head can bend; a map calibrates later.
        """
        out = torch.cat([self.model(x) for x in self.valid_inputs.split(EVALUATED, 1)], 1)
        if self.binary:
            mean = self._loss(out, self.valid_target).mean(1)
            return torch.where(self.valid_target.var(1) > 0, 1 - rank_auc(out, self.valid_target), mean)
        return self._loss(out, (self.valid_target - self._out("out_mean")) / self._out("out_std")).mean(1)

    # -- logs and checkpoints --------------------------------------------------------------------------------------

    def _log(self, row: dict[str, Any]) -> None:
        path = self.folder / "loss.csv"
        fresh = self.epoch == 1 or not path.is_file()
        with open(path, "w" if fresh else "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        state = {f"model.{n}": x.detach() for n, x in self.model.named_parameters()}
        state |= {f"best.{n}": x for n, x in self.best_weights.items()} | {"best_losses": self.best}
        for n, x in self.model.named_parameters():
            state |= {f"adam.{n}.{key}": torch.as_tensor(v) for key, v in self.optimizer.state[x].items()}
        state |= {"epoch": torch.tensor(self.epoch), "waited": torch.tensor(self.waited)}
        state["generator"] = self.generator.get_state()
        partial = self.folder / (CHECKPOINT + ".partial")
        whole = {name: x.contiguous().clone() for name, x in state.items()}
        save_file(whole, partial, {"recipe": str(self._settings())})
        partial.replace(self.folder / CHECKPOINT)

    def _settings(self) -> dict[str, Any]:
        targets = hashlib.sha256()
        for x in (self.target, self.valid_target):
            targets.update(x.cpu().numpy().tobytes())
        facts = {"tokens seen": self.inputs.shape[1], "targets": targets.hexdigest()}
        return asdict(self.recipe) | facts | ({"validation": "auc"} if self.binary else {})

    def _resume(self) -> None:
        """Go on from a checkpoint of the same recipe and data; any other is left behind."""
        path = self.folder / CHECKPOINT
        if not path.is_file() or _metadata(path).get("recipe") != str(self._settings()):
            return
        state = load_file(path, device=str(self.inputs.device))
        for name, x in self.model.named_parameters():
            x.data.copy_(state[f"model.{name}"])
            self.best_weights[name] = state[f"best.{name}"]
            prefix = f"adam.{name}."
            self.optimizer.state[x] = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        self.best, self.epoch, self.waited = state["best_losses"], int(state["epoch"]), int(state["waited"])
        self.generator.set_state(state["generator"].cpu())

    # -- result ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """(heads, n) scores in the target's own unit."""
        parts = [self.model(x) * self._out("out_std") + self._out("out_mean") for x in inputs.split(EVALUATED, 1)]
        return torch.cat(parts, 1)

    def gates(self, facts: ModelFacts, sketch: torch.Tensor, info: dict[str, Any]) -> Gates:
        """What was learned, with the quantiles of its scores on the valid split."""
        weights, biases = self.model.cpu().folded((facts.num_layers, facts.num_kv_heads))
        quantiles = score_quantiles(self.outputs(self.valid_inputs.cpu()))
        return Gates(
            weights, biases, facts, self.recipe.kind, self.recipe.inputs, sketch, quantiles,
            info=info | {"recipe": asdict(self.recipe), "valid_loss": self.best.mean().item(), "epochs": self.epoch},
        )  # fmt: skip


def rank_auc(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(heads,) areas under the ROC of scores (heads, n) for labels 1 and 0 (heads, n), by the sum of ranks.

    nan where a label is missing; equal scores count in the order in which they stand.
    """
    ranks = scores.argsort(1).argsort(1).double()
    positives = labels.double().sum(1)
    least = positives * (positives - 1) / 2
    found = ((ranks * labels).sum(1) - least) / (positives * (labels.shape[1] - positives))
    return found.to(scores.dtype)


def nn_bce(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """BCEWithLogits, element by element."""
    return torch.nn.functional.binary_cross_entropy_with_logits(out, target, reduction="none")


def _metadata(path: Path) -> dict[str, str]:
    """Raises ValueError for a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: delete it and train again ({error})") from error


def _select(tokens: TokenSet, recipe: Recipe, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    usable = tokens.usable(recipe)
    return tokens.inputs[:, usable].to(device), tokens.target(recipe)[:, usable].to(device)


def _moments(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, width) mean and standard deviation, head by head: a float32 copy of all inputs is large."""
    rows = [torch.std_mean(row.float(), 0) for row in inputs]
    return torch.stack([mean for _, mean in rows]), torch.stack([std for std, _ in rows]).clamp(min=1e-3)


def facts_of(model_name: str) -> tuple[ModelFacts, torch.Tensor]:
    """Facts and key sketch of a model by name."""
    model, _ = load(model_name, "auto")
    sketch = sketch_of(model)
    assert sketch is not None, "weights that were just loaded are whole"
    return ModelFacts.from_config(model.config), sketch


def train_gates(recipe: Recipe, data: Path, out: Path, quiet: bool = False, shards: int | None = None) -> Gates:
    """Train on a folder of shards, or the first ``shards`` of its train split; write logs and gates to ``out``."""
    names = wanted_targets(recipe)
    sets = [
        TokenSet.load(data, split, names, recipe.inputs, most) for split, most in (("train", shards), ("valid", None))
    ]
    trainer = Trainer(recipe, *sets, out)
    trainer.fit(quiet)
    facts, sketch = facts_of(recipe.model)
    made = trainer.gates(facts, sketch, {"base_model": recipe.model, "tokens": sets[0].count})
    made.decay = measure_decay(data).unflatten(0, (facts.num_layers, facts.num_kv_heads))
    made.save_pretrained(out)
    return made


def main(
    data: Annotated[Path, typer.Option(help="folder of shards")],
    out: Annotated[Path, typer.Option(help="folder for logs, checkpoint and gates")],
    recipe: Annotated[Path, typer.Option(help="a YAML file, or a name in training/recipes")] = Path("small"),
    shards: Annotated[int | None, typer.Option(help="learn from so many shards only, as for a learning curve")] = None,
) -> None:
    """Train, or go on training."""
    made = train_gates(Recipe.load(recipe), data, out, shards=shards)
    typer.echo(f"{made.num_parameters:,} parameters, validation loss {made.info['valid_loss']:.4f}", err=True)


if __name__ == "__main__":
    typer.run(main)
