"""Shards in memory: keys and targets of one split."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .recipe import Recipe


@dataclass
class TokenSet:
    """Tokens of one split. ``inputs`` (heads of all layers, n, width), targets (heads of all layers, n) float32."""

    inputs: torch.Tensor  # the model's dtype
    targets: dict[str, torch.Tensor]
    positions: torch.Tensor  # (n,) int32, in the piece
    pieces: torch.Tensor  # (n,) int64, one number per piece of text
    documents: torch.Tensor | None  # (n,) int64, one number per document; None: collected before it was written down
    length: int  # of a piece
    facts: dict[str, Any]  # dataset.json

    @property
    def count(self) -> int:
        """Tokens."""
        return self.inputs.shape[1]

    @classmethod
    def load(
        cls, folder: Path, split: str, targets: Sequence[str], inputs: str = "key", limit: int | None = None
    ) -> TokenSet:
        """Read the shards of a split, at most ``limit`` of them. Raises ValueError if there are none."""
        described = folder / "dataset.json"
        paths = sorted(folder.glob(f"{split}-*.safetensors"))[:limit]
        if not paths or not described.is_file():
            raise ValueError(f"{str(folder)!r} has no shards of the {split} split: run training.collect first")
        names = ("keys", "values") if inputs == "key_value" else ("hidden",) if inputs == "hidden" else ("keys",)
        parts, found, positions, pieces, documents = [], [], [], [], []
        for number, path in enumerate(paths):
            with _opened(path) as file:
                missing = {*names, *targets} - set(file.keys())
                if missing:
                    raise ValueError(f"{str(path)!r} has no {', '.join(sorted(missing))}: collect it by the recipe")
                parts.append(torch.cat([file.get_tensor(name) for name in names], -1))
                found.append({name: file.get_tensor(name).float() for name in targets})
                positions.append(file.get_tensor("positions"))
                pieces.append(file.get_tensor("pieces").long() + 1000 * number)
                if "documents" in file.keys():  # noqa: SIM118  # no mapping
                    documents.append(file.get_tensor("documents"))
        facts = json.loads(described.read_text())
        return cls(
            torch.cat(parts, 2).flatten(0, 1), {n: torch.cat([x[n] for x in found], 2).flatten(0, 1) for n in targets},
            torch.cat(positions), torch.cat(pieces), torch.cat(documents) if len(documents) == len(paths) else None,
            facts["recipe"]["length"], facts,
        )  # fmt: skip

    def target(self, recipe: Recipe) -> torch.Tensor:
        """(heads, n) float32 what a gate of the recipe learns: a value, or 1 and 0 for binary gates."""
        x = self.targets[recipe.target]
        if recipe.kind == "binary":
            return (x > torch.tensor(recipe.threshold).log()).float()
        return x + self.targets["value_norm"] if recipe.weighted else x

    def usable(self, recipe: Recipe) -> torch.Tensor:
        """(n,) bool: tokens that enough later tokens follow for the target to mean anything."""
        if not recipe.target.startswith("future"):
            return torch.ones_like(self.positions, dtype=torch.bool)
        horizon = int(recipe.target.rsplit("_", 1)[1])
        return self.positions < self.length - horizon - self.length // 8


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard. Raises ValueError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"shard {str(path)!r} is damaged: delete it and collect again ({error})") from error


def wanted_targets(recipe: Recipe) -> list[str]:
    """Names of the stored targets that a recipe needs."""
    return [recipe.target] + (["value_norm"] if recipe.weighted else [])
