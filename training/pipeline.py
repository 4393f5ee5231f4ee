"""Collect, train, evaluate and export in one go; a run that was stopped goes on where it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .collect import collect_shards
from .evaluate import evaluate_gates
from .export import export_gates
from .recipe import Recipe
from .train import train_gates


def run(recipe: Recipe, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Everything in one folder: shards, training, evaluation, and the finished gates in ``gates``.

    Returns the evaluation's summary and the seconds of each step. Raises ValueError for a recipe that leaves nothing to
    learn from.
    """
    if recipe.valid_share == 1:
        raise ValueError("valid_share must be below 1 to train: with 1, all documents are held out")
    seconds, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name], start = now - start, now

    collect_shards(recipe, out / "shards", quiet=quiet)
    lap("collect")
    train_gates(recipe, out / "shards", out / "training", quiet)
    lap("train")
    result = evaluate_gates(out / "training", out / "shards", out / "evaluation")
    lap("evaluate")
    made = export_gates(out / "training", out / "gates")
    lap("export")
    result.pop("rows")
    return result | {"gates": str(out / "gates"), "parameters": made.num_parameters, "seconds": seconds}
