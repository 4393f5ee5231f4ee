"""Collect what gates learn from: pre-RoPE keys of a real model, and how much attention each token received later.

python -m training.collect --recipe smollm2 --out runs/smollm2
accelerate launch --num_processes 2 -m training.collect ...      the shards are the same, whoever makes them

A shard is one safetensors file of PIECES pieces of text; what is there is not made again. Every tenth shard is made of
documents of the valid split, and every one where the recipe holds out all documents (``valid_share: 1``: for judging
gates). A piece is seen twice, with a request to repeat it in between (training/targets.py).
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
from .texts import SPLITS, Document, Mixture

PIECES = 8  # of text, in a shard
VALID_EVERY = 10  # one shard in so many
REQUEST = "\n\nRepeat the previous context exactly.\n\n"
SINKS = 4  # first tokens of a piece, never stored: the cache keeps them anyway
FORMAT = 2  # 1: splits depended on how many documents there were, and no shard said which ones it holds


@dataclass(frozen=True)
class Shard:
    """A file to be made; its content depends on the recipe and its number alone."""

    number: int
    split: str

    def path(self, folder: Path) -> Path:
        return folder / f"{self.split}-{self.number:05d}.safetensors"


def plan(recipe: Recipe) -> list[Shard]:
    """All shards of a recipe: at least one of each split that it has documents for."""
    count = math.ceil(recipe.tokens / (recipe.length * PIECES))
    if recipe.valid_share == 1:
        return [Shard(i, "valid") for i in range(count)]
    return [Shard(i, "train" if (i + 1) % VALID_EVERY else "valid") for i in range(max(count, VALID_EVERY))]


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
        """Tensors of a shard: those of ``piece``, and the position, the piece and the document of each token."""
        recipe, parts = self.recipe, list[dict[str, torch.Tensor]]()
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + shard.number)
        count = max(round(recipe.keep * (recipe.length - SINKS)), 1)
        for i in range(PIECES):
            text, document = texts.piece(self.tokenizer, f"{recipe.seed}/{shard.number}/{i}", recipe.length)
            chosen = torch.randperm(recipe.length - SINKS, generator=generator)[:count].add(SINKS).sort().values
            part = self.piece(text, chosen.to(self.device))
            part |= {"positions": chosen.int(), "pieces": torch.full_like(chosen, i, dtype=torch.int32)}
            parts.append(part | {"documents": torch.full_like(chosen, document.number)})
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


def collected(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """dataset.json, empty without one. Raises ValueError if the folder belongs to another recipe."""
    path = folder / "dataset.json"
    if not path.is_file():
        return {}
    known: dict[str, Any] = json.loads(path.read_text())
    size = known["recipe"] | {"tokens": recipe.tokens}  # may grow: a shard does not depend on how many there are
    if known["format"] > FORMAT or size != recipe.data():
        raise ValueError(f"{str(folder)!r} holds shards of another recipe: name another folder with --out")
    return known


def describe(folder: Path, recipe: Recipe, config: Any, texts: dict[str, Mixture]) -> None:
    """Write dataset.json, unless the folder's promises as many tokens.

    Raises ValueError if the shards that are there are of another recipe, or of other documents.
    """
    known, digests = collected(folder, recipe), {split: mixture.digest() for split, mixture in texts.items()}
    if known.get("format", FORMAT) < FORMAT:
        raise ValueError(
            f"{str(folder)!r} was collected by an older version, which split documents in another way: train and "
            "evaluate on what is there, or name another folder with --out"
        )
    if known and known["documents"] != digests:
        raise ValueError(f"the documents of {str(folder)!r} have changed since: name another folder with --out")
    if known.get("recipe", {}).get("tokens", 0) >= recipe.tokens:
        return
    path = folder / "dataset.json"
    folder.mkdir(parents=True, exist_ok=True)
    geometry = ModelGeometry.from_config(config)
    shape = {"num_layers": geometry.num_layers, "num_kv_heads": geometry.num_kv_heads, "head_dim": geometry.head_dim}
    facts = {"format": FORMAT, "recipe": recipe.data(), "documents": digests, "held_out": names_of(texts["valid"])}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(facts | shape, indent=2) + "\n")
    partial.replace(path)


def names_of(texts: Mixture) -> dict[str, str]:
    """Documents by their number, as JSON keeps it."""
    found: list[Document] = [document for source in texts.sources for document in source.documents]
    return {str(document.number): document.name for document in found}


def collect_shards(recipe: Recipe, folder: Path, seconds: float = math.inf, quiet: bool = False) -> int:
    """Make what is missing of a data set, for at most about ``seconds``; returns how many shards are still missing.

    Raises ValueError, before anything is made or reused, for a folder of another recipe or of other documents.
    """
    collected(folder, recipe)
    start, todo = time.monotonic(), list(missing(folder, recipe))
    if not todo:
        return 0
    splits = [split for split in SPLITS if recipe.valid_share < 1 or split == "valid"]
    texts = {split: Mixture.read(recipe.sources, split, recipe.valid_share).bundled(recipe.length) for split in splits}
    model, tokenizer = load(recipe.model, recipe.dtype)
    if torch.cuda.is_available():
        model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    describe(folder, recipe, model.config, texts)
    collector = Collector(model, tokenizer, recipe)
    bar = tqdm(total=len(todo) * PIECES * recipe.length, unit="token", unit_scale=True, disable=quiet, mininterval=5)
    with bar:
        for done, shard in enumerate(todo):
            if time.monotonic() - start > seconds:
                return len(todo) - done
            path = shard.path(folder)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file(collector.shard(shard, texts[shard.split]), partial, {"format": "pt"})
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
