"""How good are gates? Per head, on documents that training never saw.

python -m training.evaluate --gates runs/smollm2/gates --data runs/smollm2/shards --out runs/smollm2/evaluation

Label: attention above ``threshold`` from a query more than ``horizon`` tokens later. Scores become probabilities by a
logistic map per head (Platt; a temperature and an offset), fitted on the even pieces of text; everything is measured on
the odd ones. The map and the quantiles of the scores are written into the gate file, so that a policy can ask for a
probability or a retention.
"""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, r2_score, roc_auc_score

from bench.output import show
from smartkv_ext.gates import Gates
from smartkv_ext.gates.gates import score_quantiles

from .dataset import TokenSet
from .plots import draw_all
from .recipe import Recipe

PROBABILITIES = (0.1, 0.2, 0.5)
BINS = 10  # of the calibration error
LEAST_POSITIVES = 5  # a head with fewer has no AUC


@dataclass
class Measured:
    """Odd pieces: (heads, n) labels and scores, calibrated probabilities, target and what the gate says of it."""

    labels: numpy.ndarray[Any, Any]
    scores: numpy.ndarray[Any, Any]
    probabilities: numpy.ndarray[Any, Any]
    target: numpy.ndarray[Any, Any]
    calibration: torch.Tensor  # (heads, 2)
    quantiles: torch.Tensor  # of the scores of all pieces
    isotonic_error: list[float]


def scores_of(gates: Gates, tokens: TokenSet) -> torch.Tensor:
    """(heads, n) float32 scores of stored tokens."""
    heads, size = gates.model.num_kv_heads, gates.model.head_dim
    layers = list(tokens.inputs.unflatten(0, (-1, heads)).unsqueeze(1).unbind(0))
    values = [x[..., size:] for x in layers] if gates.inputs == "key_value" else None
    return gates.score([x[..., :size].contiguous() for x in layers], values).flatten(0, 2)


def platt(scores: Any, labels: Any) -> tuple[float, float]:
    """Slope and offset of the logistic map; a head without both labels gets the identity."""
    if not 0 < labels.sum() < len(labels):
        return 1.0, 0.0
    spread = max(float(scores.std()), 1e-6)
    fitted = LogisticRegression(C=1e3).fit((scores / spread)[:, None], labels)
    return max(float(fitted.coef_[0, 0]) / spread, 1e-3), float(fitted.intercept_[0])


def calibration_error(probabilities: Any, labels: Any) -> float:
    """Expected calibration error over BINS bins of equal width."""
    place = numpy.minimum((probabilities * BINS).astype(int), BINS - 1)
    parts = [(place == b) for b in range(BINS)]
    return float(sum(abs(probabilities[p].mean() - labels[p].mean()) * p.mean() for p in parts if p.any()))


def measure(gates: Gates, tokens: TokenSet, recipe: Recipe) -> Measured:
    """Score, calibrate on even pieces, hand back the odd ones."""
    label_name = f"future_max_{recipe.horizon}"
    far = tokens.positions < tokens.length - recipe.horizon - tokens.length // 8
    even = (tokens.pieces % 2 == 0).numpy()
    label = (tokens.targets[label_name] > numpy.log(recipe.threshold)).numpy()
    found = scores_of(gates, tokens)
    scores = found.numpy()
    fit, test = even & far.numpy(), ~even & far.numpy()
    maps = [platt(s[fit], y[fit]) for s, y in zip(scores, label, strict=True)]
    slope, offset = torch.tensor(maps, dtype=torch.float64)[..., None].unbind(1)
    probabilities = torch.sigmoid(slope * found + offset).numpy()  # exp of a large score would overflow
    isotonic = [
        calibration_error(
            IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(s[fit], y[fit]).predict(s[test]), y[test]
        )
        for s, y in zip(scores, label, strict=True)
    ]
    target = tokens.target(recipe).numpy()
    return Measured(
        label[:, test], scores[:, test], probabilities[:, test], target[:, test], torch.tensor(maps),
        score_quantiles(found), isotonic,
    )  # fmt: skip


def head_rows(found: Measured, num_kv_heads: int, regression: bool) -> list[dict[str, Any]]:
    """A row of figures for every head; None where a figure does not exist."""
    rows = []
    for i, (y, s, p) in enumerate(zip(found.labels, found.scores, found.probabilities, strict=True)):
        known = LEAST_POSITIVES <= y.sum() <= len(y) - LEAST_POSITIVES
        row: dict[str, Any] = {
            "layer": i // num_kv_heads, "head": i % num_kv_heads, "tokens": len(y), "positives": int(y.sum()),
            "auc": float(roc_auc_score(y, s)) if known else None,
            "average_precision": float(average_precision_score(y, s)) if known else None,
            "f1": float(f1_score(y, p > 0.5, zero_division=0)) if known else None,
            "calibration_error": calibration_error(p, y), "calibration_error_isotonic": found.isotonic_error[i],
            "r2": float(r2_score(found.target[i], s)) if regression else None,
        }  # fmt: skip
        for limit in PROBABILITIES:
            tn, fp, fn, tp = confusion_matrix(y, p > limit, labels=[False, True]).ravel().tolist()
            row[f"sensitivity_{limit}"] = tp / (tp + fn) if tp + fn else None
            row[f"specificity_{limit}"] = tn / (tn + fp) if tn + fp else None
            row[f"retention_{limit}"] = (tp + fp) / len(y)
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over heads, the best AUC, and the share of heads with an AUC of 0.9 and more."""
    out: dict[str, float] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        if name not in ("layer", "head") and values:
            out[name] = float(numpy.median(values))
    aucs = [row["auc"] for row in rows if row["auc"] is not None]
    if aucs:
        out |= {"best auc": max(aucs), "heads with auc of 0.9": sum(a >= 0.9 for a in aucs) / len(aucs)}
    return out | {"heads measured": len(aucs)}


def recipe_of(gates: Gates) -> Recipe:
    """What gates were trained for, as far as exported ones say it. Raises ValueError if they do not."""
    if "recipe" in gates.info:
        return Recipe(**gates.info["recipe"])
    known = {name: gates.info[name] for name in ("target", "weighted") if name in gates.info}
    if "target" not in known:
        raise ValueError(
            "these gates do not say what they were trained for: name the folder 'training' of their run with --gates"
        )
    return Recipe(kind=gates.kind, inputs=gates.inputs, **known, **gates.info.get("calibrated", {}))


def evaluate_gates(folder: Path, data: Path, out: Path, split: str = "valid", **changes: Any) -> dict[str, Any]:
    """Measure gates in a folder on shards, write tables and plots to ``out``, and the calibration into the gates.

    Another split than valid is measured alone. Raises ValueError for shards of another model.
    """
    gates = Gates.from_pretrained(folder)
    recipe = replace(recipe_of(gates), **changes)
    names = {recipe.target, f"future_max_{recipe.horizon}", "value_norm"}
    tokens = TokenSet.load(data, split, sorted(names), recipe.inputs)
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        if tokens.facts[name] != (want := getattr(gates.model, name)):
            raise ValueError(f"{str(data)!r} is of another model: {name} is {tokens.facts[name]}, the gates' is {want}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        found = measure(gates, tokens, recipe)
        rows = head_rows(found, gates.model.num_kv_heads, recipe.kind != "binary")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "sensitivity_specificity.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    result = {"gates": str(folder), "horizon": recipe.horizon, "threshold": recipe.threshold, **summary(rows)}
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_all(found, rows, gates, folder / "loss.csv", out)
    if split == "valid":  # training has seen the others: scores on them promise too much
        gates.calibration = found.calibration.float().unflatten(0, (gates.model.num_layers, gates.model.num_kv_heads))
        gates.quantiles = found.quantiles
        gates.info["calibrated"] = {"horizon": recipe.horizon, "threshold": recipe.threshold}
        gates.save_pretrained(folder)
    return result | {"rows": rows}


def show_evaluation(title: str, result: dict[str, Any], json_only: bool = False) -> None:
    """A table of heads, then the medians as a line of JSON."""
    columns = ("layer", "head", "positives", "auc", "average_precision", "f1", "sensitivity_0.1", "specificity_0.1",
               "retention_0.1", "calibration_error", "r2")  # fmt: skip
    rows = [{name: row[name] for name in columns} for row in result["rows"]]
    show(title, rows, {name: x for name, x in result.items() if name != "rows"}, json_only)


def main(
    gates: Annotated[Path, typer.Option(help="folder of gates")],
    data: Annotated[Path, typer.Option(help="folder of shards")],
    out: Annotated[Path, typer.Option(help="folder for tables and plots")],
    split: str = "valid",
    horizon: int = 256,
    threshold: float = 0.03,
) -> None:
    """Print a row per head and the medians; last line JSON."""
    result = evaluate_gates(gates, data, out, split, horizon=horizon, threshold=threshold)
    show_evaluation(f"{gates}: {split}", result)


if __name__ == "__main__":
    typer.run(main)
