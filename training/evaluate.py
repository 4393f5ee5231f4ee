"""How good are gates? Per head, on documents that training never saw.

python -m training.evaluate --gates runs/smollm2/gates --data runs/smollm2/shards --out runs/smollm2/evaluation

Label: attention above ``threshold`` from a query more than ``horizon`` tokens later. Scores become probabilities by a
logistic map per head (Platt; a temperature and an offset). To judge the map, the documents are cut into two halves, and
each is judged with the map that the other one gave. The map of all documents and the quantiles of the scores are
written into gates that have none, or with ``calibrate``, so that a policy can ask for a probability or a retention.
"""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import asdict, dataclass
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
from .intervals import halves, median_auc_interval
from .plots import draw_all
from .recipe import Recipe

PROBABILITIES = (0.1, 0.2, 0.5)
BINS = 10  # of the calibration error
LEAST_POSITIVES = 10  # a head with fewer has no AUC
LEAST_SLOPE = 1e-3  # of the logistic map, by standard deviation of the scores
DIGITS = 5  # of figures in tables


@dataclass(frozen=True)
class Label:
    """What counts as "matters much later"."""

    horizon: int
    threshold: float


@dataclass
class Measured:
    """Judged tokens: (heads, n) labels and scores, cross-fitted probabilities, target and what the gate says of it."""

    labels: numpy.ndarray[Any, Any]
    scores: numpy.ndarray[Any, Any]
    probabilities: numpy.ndarray[Any, Any]
    isotonic: numpy.ndarray[Any, Any]  # the same by isotonic regression
    target: numpy.ndarray[Any, Any]
    pieces: numpy.ndarray[Any, Any]  # (n,)
    documents: numpy.ndarray[Any, Any] | None  # (n,)
    calibration: torch.Tensor  # (heads, 2), of all judged tokens
    quantiles: torch.Tensor  # of the scores of all tokens

    @property
    def groups(self) -> numpy.ndarray[Any, Any]:
        """(n,) what calibration and judgement share none of: documents, or pieces where there are not two documents."""
        several = self.documents is not None and len(numpy.unique(self.documents)) > 1
        return self.documents if several and self.documents is not None else self.pieces


def scores_of(gates: Gates, tokens: TokenSet) -> torch.Tensor:
    """(heads, n) float32 scores of stored tokens."""
    heads, size = gates.model.num_kv_heads, gates.model.head_dim
    layers = list(tokens.inputs.unflatten(0, (-1, heads)).unsqueeze(1).unbind(0))
    values = [x[..., size:] for x in layers] if gates.inputs == "key_value" else None
    return gates.score([x[..., :size].contiguous() for x in layers], values).flatten(0, 2)


def platt(scores: Any, labels: Any) -> tuple[float, float]:
    """Slope and offset of the logistic map. Where a label is missing, nearly flat, at the label's rate (Laplace)."""
    spread = max(float(scores.std()), 1e-6) if len(scores) else 1.0
    if not 0 < labels.sum() < len(labels):
        slope, rate = LEAST_SLOPE / spread, (float(labels.sum()) + 0.5) / (len(labels) + 1)
        return slope, float(numpy.log(rate / (1 - rate))) - slope * float(scores.mean() if len(scores) else 0)
    fitted = LogisticRegression(C=1e3).fit((scores / spread)[:, None], labels)
    return max(float(fitted.coef_[0, 0]), LEAST_SLOPE) / spread, float(fitted.intercept_[0])


def calibration_error(probabilities: Any, labels: Any) -> float:
    """Expected calibration error over BINS bins of equal width."""
    place = numpy.minimum((probabilities * BINS).astype(int), BINS - 1)
    parts = [(place == b) for b in range(BINS)]
    return float(sum(abs(probabilities[p].mean() - labels[p].mean()) * p.mean() for p in parts if p.any()))


def mapped(slopes: Any, scores: torch.Tensor) -> Any:
    """Probabilities (heads, n) of maps (heads, 2)."""
    slope, offset = torch.tensor(slopes, dtype=torch.float64)[..., None].unbind(1)
    return torch.sigmoid(slope * scores + offset).numpy()  # exp of a large score would overflow


def measure(gates: Gates, tokens: TokenSet, recipe: Recipe, wanted: Label) -> Measured:
    """Score all tokens; calibrate and judge those that enough later ones follow."""
    far = tokens.positions < tokens.length - wanted.horizon - tokens.length // 8
    found = scores_of(gates, tokens)
    label = (tokens.targets[f"future_max_{wanted.horizon}"] > numpy.log(wanted.threshold))[:, far].numpy()
    judged = found[:, far]
    scores = judged.numpy()
    documents = None if tokens.documents is None else tokens.documents[far].numpy()
    out = Measured(
        label, scores, numpy.zeros(scores.shape), numpy.zeros(scores.shape), tokens.target(recipe)[:, far].numpy(),
        tokens.pieces[far].numpy(), documents,
        torch.tensor([platt(s, y) for s, y in zip(scores, label, strict=True)]), score_quantiles(found),
    )  # fmt: skip
    side = halves(out.groups)
    for test in (side == 0, side == 1):
        if not test.any() or test.all():
            raise ValueError("evaluation needs at least two pieces of text: collect more tokens")
        maps = [platt(s[~test], y[~test]) for s, y in zip(scores, label, strict=True)]
        out.probabilities[:, test] = mapped(maps, judged[:, test])
        for i, (s, y) in enumerate(zip(scores, label, strict=True)):
            curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(s[~test], y[~test])
            out.isotonic[i, test] = curve.predict(s[test])
    return out


def head_rows(found: Measured, num_kv_heads: int, regression: bool) -> list[dict[str, Any]]:
    """A row of figures for every head; None where a figure does not exist."""
    rows = []
    for i, (y, s, p) in enumerate(zip(found.labels, found.scores, found.probabilities, strict=True)):
        known = is_known(y)
        row: dict[str, Any] = {
            "layer": i // num_kv_heads, "head": i % num_kv_heads, "tokens": len(y), "positives": int(y.sum()),
            "auc": float(roc_auc_score(y, s)) if known else None,
            "average_precision": float(average_precision_score(y, s)) if known else None,
            "f1": float(f1_score(y, p > 0.5, zero_division=0)) if known else None,
            "calibration_error": calibration_error(p, y),
            "calibration_error_isotonic": calibration_error(found.isotonic[i], y),
            "r2": float(r2_score(found.target[i], s)) if regression else None,
        }  # fmt: skip
        for limit in PROBABILITIES:
            tn, fp, fn, tp = confusion_matrix(y, p > limit, labels=[False, True]).ravel().tolist()
            row[f"sensitivity_{limit}"] = tp / (tp + fn) if tp + fn else None
            row[f"specificity_{limit}"] = tn / (tn + fp) if tn + fp else None
            row[f"retention_{limit}"] = (tp + fp) / len(y)
        rows.append(row)
    return rows


def is_known(labels: Any) -> bool:
    """Whether a head has enough tokens of both labels (n,) for an AUC."""
    return bool(LEAST_POSITIVES <= labels.sum() <= len(labels) - LEAST_POSITIVES)


def summary(rows: list[dict[str, Any]], found: Measured) -> dict[str, Any]:
    """Medians over heads, how sure that of the AUC is, the best AUC, and the share of heads with at least 0.9."""
    out: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        if name not in ("layer", "head") and values:
            out[name] = float(numpy.median(values))
    aucs = [row["auc"] for row in rows if row["auc"] is not None]
    if aucs:
        known = [i for i, y in enumerate(found.labels) if is_known(y)]
        out |= {"best auc": max(aucs), "heads with auc of 0.9": sum(a >= 0.9 for a in aucs) / len(aucs)}
        for name, groups in (("documents", found.documents), ("pieces", found.pieces)):
            if groups is not None:
                out[name] = len(numpy.unique(groups))
                out[f"auc by {name}"] = median_auc_interval(found.labels[known], found.scores[known], groups)
    out["judged by"] = "piece" if found.groups is found.pieces else "document"
    return out | {"heads measured": len(aucs), "heads left out": len(rows) - len(aucs)}


def recipe_of(gates: Gates) -> Recipe:
    """What gates were trained for, as far as exported ones say it. Raises ValueError if they do not."""
    if "recipe" in gates.info:
        return Recipe(**gates.info["recipe"])
    known = {name: gates.info[name] for name in ("target", "weighted", "horizon") if name in gates.info}
    if "target" not in known:
        raise ValueError(
            "these gates do not say what they were trained for: name the folder 'training' of their run with --gates"
        )
    return Recipe(kind=gates.kind, inputs=gates.inputs, **known)


def evaluate_gates(
    folder: Path, data: Path, out: Path, split: str = "valid", horizon: int | None = None,
    threshold: float | None = None, calibrate: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure gates in a folder on shards, write tables and plots to ``out``, and the calibration into the gates.

    ``horizon`` and ``threshold`` of the label are those of the last calibration by default, or the recipe's. Gates that
    are calibrated stay as they are, unless ``calibrate`` asks for it. Another split than valid is measured alone.
    Raises ValueError for shards of another model.
    """
    gates = Gates.from_pretrained(folder)
    recipe = recipe_of(gates)
    label = Label(**({"horizon": recipe.horizon, "threshold": recipe.threshold} | gates.info.get("calibrated", {})))
    label = Label(label.horizon if horizon is None else horizon, label.threshold if threshold is None else threshold)
    names = {recipe.target, f"future_max_{label.horizon}", "value_norm"}
    tokens = TokenSet.load(data, split, sorted(names), recipe.inputs)
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        if tokens.facts[name] != (want := getattr(gates.model, name)):
            raise ValueError(f"{str(data)!r} is of another model: {name} is {tokens.facts[name]}, the gates' is {want}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        found = measure(gates, tokens, recipe, label)
        rows = head_rows(found, gates.model.num_kv_heads, recipe.kind != "binary")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "sensitivity_specificity.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(x, DIGITS) if isinstance(x, float) else x for k, x in row.items()} for row in rows)
    # Training has seen the other splits: scores on them promise too much.
    written = split == "valid" and (calibrate or gates.calibration is None)
    result = {"gates": str(folder), **asdict(label), **summary(rows, found), "calibration written": written}
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_all(found, rows, gates, folder / "loss.csv", out)
    if written:
        gates.calibration = found.calibration.float().unflatten(0, (gates.model.num_layers, gates.model.num_kv_heads))
        gates.quantiles = found.quantiles
        gates.info["calibrated"] = asdict(label)
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
    horizon: Annotated[int | None, typer.Option(help="32 or 256 tokens; default: as calibrated or trained")] = None,
    threshold: Annotated[float | None, typer.Option(help="attention that matters; default: likewise")] = None,
    calibrate: Annotated[bool, typer.Option(help="replace the calibration of gates that have one")] = False,
) -> None:
    """Print a row per head and the medians; last line JSON."""
    result = evaluate_gates(gates, data, out, split, horizon, threshold, calibrate)
    show_evaluation(f"{gates}: {split}", result)


if __name__ == "__main__":
    typer.run(main)
