"""What attention does in a model, per layer and KV head: lifespans, sinks, locality, tokens that matter late, norms.

python -m training.explore --recipe smollm2 --out runs/smollm2/explore
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from tqdm import tqdm

from bench.models import load
from bench.output import show

from .collect import SINKS, Collector
from .recipe import Recipe
from .texts import Mixture

LOCAL, LATE = 32, 256  # tokens; horizons of training.targets
COLUMNS = ("lifespan", "sinks", "local", "late", "significant_late", "key_norm")


def statistics(collector: Collector, text: torch.Tensor) -> torch.Tensor:
    """(layers, num_kv_heads, len(COLUMNS)) of one piece of text. Shares are of all attention paid within the text,
    that of the sinks by queries more than LOCAL tokens later.
    """
    length = len(text)
    found = collector.piece(text, torch.arange(length, device=collector.device))
    x = {name: value.float() for name, value in found.items()}
    # Every query head pays 1 in total; p of a query group is a sum over its heads.
    paid = length * collector.model.config.num_attention_heads / x["keys"].shape[1]
    far, late = x["future_sum_32"].exp(), x["future_sum_256"].exp()
    rest = slice(SINKS, None)
    judged = slice(SINKS, max(length - LATE - length // 8, SINKS + 1))
    significant = x["future_max_256"][..., judged] > math.log(collector.recipe.threshold)
    parts = (
        (4 ** x["lifespan"][..., rest] - 1).median(-1).values, far[..., :SINKS].sum(-1) / paid, 1 - far.sum(-1) / paid,
        late[..., rest].sum(-1) / paid, significant.float().mean(-1), x["keys"][..., rest, :].norm(dim=-1).mean(-1),
    )  # fmt: skip
    return torch.stack(parts, -1)


def explore(recipe: Recipe, out: Path, pieces: int, quiet: bool = False) -> list[dict[str, Any]]:
    """A row per head, written to heads.csv with a picture beside it."""
    model, tokenizer = load(recipe.model, recipe.dtype)
    collector = Collector(model, tokenizer, recipe)
    texts = Mixture.read(recipe.sources, "train", recipe.valid_share).bundled(recipe.length)
    found = [
        statistics(collector, texts.piece(tokenizer, f"explore/{recipe.seed}/{i}", recipe.length)[0])
        for i in tqdm(range(pieces), unit="piece", disable=quiet)
    ]
    mean = torch.stack(found).mean(0)
    rows = [
        {"layer": layer, "head": head, **dict(zip(COLUMNS, mean[layer, head].tolist(), strict=True))}
        for layer in range(mean.shape[0])
        for head in range(mean.shape[1])
    ]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "heads.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _draw(mean).savefig(out / "heads.png")
    return rows


def _draw(mean: torch.Tensor) -> Figure:
    figure = Figure(figsize=(2.2 * len(COLUMNS), 1.5 + 0.2 * mean.shape[0]), layout="constrained", dpi=90)
    for i, name in enumerate(COLUMNS):
        axes = figure.add_subplot(1, len(COLUMNS), i + 1)
        picture = axes.imshow(mean[..., i].numpy(), aspect="auto", cmap="viridis")
        axes.set_title(name)
        axes.set_xlabel("KV head")
        figure.colorbar(picture, ax=axes)
    figure.axes[0].set_ylabel("layer")
    return figure


def main(
    out: Annotated[Path, typer.Option(help="folder for heads.csv and heads.png")],
    recipe: Annotated[Path, typer.Option(help="a YAML file, or a name in training/recipes")] = Path("small"),
    pieces: Annotated[int, typer.Option(min=1, help="pieces of text")] = 4,
) -> None:
    """Print a row per head; last line JSON."""
    chosen = Recipe.load(recipe)
    rows = explore(chosen, out, pieces)
    show(f"{chosen.model}: attention, {pieces} pieces of {chosen.length} tokens", rows, {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
