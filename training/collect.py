"""Collect what gates learn from: pre-RoPE keys of a real model, and how much attention each token received later.

python -m training.collect --recipe smollm2 --out runs/smollm2
accelerate launch --num_processes 2 -m training.collect ...      the shards are the same, whoever makes them

A shard is one safetensors file of PIECES pieces of text; what is there is not made again. Every tenth shard is made of
documents of the valid split. A piece is seen twice, with a request to repeat it in between (training/targets.py).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from tqdm import tqdm

from bench.models import load
from smartkv_ext.cache.config import ModelGeometry

from .recipe import Recipe
from .recording import LayerCall, recording
from .targets import attention_targets, value_norms
from .texts import SPLITS, Mixture

PIECES = 8  # of text, in a shard
VALID_EVERY = 10  # one shard in so many
REQUEST = "\n\nRepeat the previous context exactly.\n\n"
SINKS = 4  # first tokens of a piece, never stored: the cache keeps them anyway
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A file to be made; its content depends on the recipe and its number alone."""

    number: int

    @property
    def split(self) -> str:
        return "valid" if self.number % VALID_EVERY == VALID_EVERY - 1 else "train"

    def path(self, folder: Path) -> Path:
        return folder / f"{self.split}-{self.number:05d}.safetensors"


def plan(recipe: Recipe) -> list[Shard]:
    """All shards of a recipe: at least one of each split."""
    count = max(math.ceil(recipe.tokens / (recipe.length * PIECES)), VALID_EVERY if recipe.tokens > 0 else 0)
    return [Shard(i) for i in range(count)]


class Collector:
    """Runs pieces of text through a model and keeps keys and targets of every layer."""

    def __init__(self, model: Any, tokenizer: Any, recipe: Recipe) -> None:
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.device = next(model.parameters()).device
        self.request = tokenizer(REQUEST, add_special_tokens=False, return_tensors="pt").input_ids[0]

    @torch.no_grad()
    def piece(self, text: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keys (layers, num_kv_heads, n, head_dim) and targets (layers, num_kv_heads, n) of the ``chosen`` tokens.

        text (length,), chosen (n,) indices.
        """
        length, layers = len(text), list[dict[str, torch.Tensor]]()

        def listen(call: LayerCall) -> None:
            found = attention_targets(call.q[0], call.k[0], call.scale, length)
            found["value_norm"] = value_norms(call, length)
            found["keys"] = call.pre_rope[0, :, :length]
            if self.recipe.values:
                found["values"] = call.v[0, :, :length]
            if self.recipe.hidden:
                found["hidden"] = call.hidden[0, None, :length]
            layers.append({name: x[:, chosen].cpu() for name, x in found.items()})

        ids = torch.cat([text, self.request, text])[None].to(self.device)
        with recording(self.model, listen):
            self.model.base_model(ids, use_cache=False)
        return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}

    def shard(self, shard: Shard, texts: Mixture) -> dict[str, torch.Tensor]:
        """Tensors of a shard: those of ``piece``, and the position and piece of each token."""
        recipe, parts = self.recipe, list[dict[str, torch.Tensor]]()
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + shard.number)
        count = max(round(recipe.keep * (recipe.length - SINKS)), 1)
        for i in range(PIECES):
            text = texts.piece(self.tokenizer, f"{recipe.seed}/{shard.number}/{i}", recipe.length)
            chosen = torch.randperm(recipe.length - SINKS, generator=generator)[:count].add(SINKS).sort().values
            part = self.piece(text, chosen.to(self.device))
            parts.append(part | {"positions": chosen.int(), "pieces": torch.full_like(chosen, i, dtype=torch.int32)})
        joined = {}
        for name in parts[0]:
            dim = 0 if parts[0][name].dim() == 1 else 2
            joined[name] = torch.cat([part[name] for part in parts], dim).contiguous()
        return joined


def missing(folder: Path, recipe: Recipe) -> Iterator[Shard]:
    """Shards that this process is to make: every process of a launch takes its share. Those of the valid split come
    first, so that what a stopped run has collected can be used.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for shard in sorted(plan(recipe)[rank::world], key=lambda shard: shard.split == "train"):
        if not shard.path(folder).is_file():
            yield shard


def collected(folder: Path, recipe: Recipe) -> int:
    """Tokens that dataset.json promises, 0 without one. Raises ValueError if the folder belongs to another recipe."""
    path = folder / "dataset.json"
    if not path.is_file():
        return 0
    facts, known = {"format": FORMAT, "recipe": recipe.data()}, json.loads(path.read_text())
    size = known["recipe"] | {"tokens": recipe.tokens}  # may grow: a shard does not depend on how many there are
    if {k: known[k] for k in facts} | {"recipe": size} != facts:
        raise ValueError(f"{str(folder)!r} holds shards of another recipe: name another folder with --out")
    return int(known["recipe"].get("tokens", 0))


def describe(folder: Path, recipe: Recipe, config: Any) -> None:
    """Write dataset.json, unless the folder's promises as many tokens. Raises ValueError if it is of another recipe."""
    if collected(folder, recipe) >= recipe.tokens:
        return
    facts, path = {"format": FORMAT, "recipe": recipe.data()}, folder / "dataset.json"
    folder.mkdir(parents=True, exist_ok=True)
    geometry = ModelGeometry.from_config(config)
    shape = {"num_layers": geometry.num_layers, "num_kv_heads": geometry.num_kv_heads, "head_dim": geometry.head_dim}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(facts | shape, indent=2) + "\n")
    partial.replace(path)


def collect_shards(recipe: Recipe, folder: Path, seconds: float = math.inf, quiet: bool = False) -> int:
    """Make what is missing of a data set, for at most about ``seconds``; returns how many shards are still missing.

    Raises ValueError, before anything is made or reused, for a folder of another recipe.
    """
    collected(folder, recipe)
    start, todo = time.monotonic(), list(missing(folder, recipe))
    if not todo:
        return 0
    model, tokenizer = load(recipe.model, recipe.dtype)
    if torch.cuda.is_available():
        model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    describe(folder, recipe, model.config)
    mixtures = {split: Mixture.read(recipe.sources, split, recipe.valid_share) for split in SPLITS}
    collector = Collector(model, tokenizer, recipe)
    bar = tqdm(total=len(todo) * PIECES * recipe.length, unit="token", unit_scale=True, disable=quiet, mininterval=5)
    with bar:
        for done, shard in enumerate(todo):
            if time.monotonic() - start > seconds:
                return len(todo) - done
            path = shard.path(folder)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file(collector.shard(shard, mixtures[shard.split]), partial, {"format": "pt"})
            partial.replace(path)
            bar.update(PIECES * recipe.length)
    return 0


def main(
    out: Annotated[Path, typer.Option(help="folder of the shards")],
    recipe: Annotated[Path, typer.Option(help="a YAML file, or a name in training/recipes")] = Path("small"),
    model: Annotated[str | None, typer.Option(help="instead of the recipe's")] = None,
    seconds: Annotated[float, typer.Option(help="stop after about this long; a later call goes on")] = math.inf,
) -> None:
    """Collect, or go on collecting."""
    left = collect_shards(Recipe.load(recipe, **({"model": model} if model else {})), out, seconds)
    typer.echo(f"{left} shards are still to be made" if left else f"{out} is complete", err=True)


if __name__ == "__main__":
    typer.run(main)
