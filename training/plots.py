"""Pictures of an evaluation: loss, ROC and calibration grids, confusion matrices, maps of all heads."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_curve

from smartkv_ext.gates import Gates

if TYPE_CHECKING:
    from .evaluate import Measured

CELL = 1.1  # inches


def draw_all(found: Measured, rows: list[dict[str, Any]], gates: Gates, losses: Path, out: Path) -> None:
    """Write every picture of an evaluation to ``out``."""
    columns = gates.model.num_kv_heads * max(1, round(math.sqrt(gates.model.num_layers / gates.model.num_kv_heads)))

    def roc(axes: Axes, i: int) -> None:
        x, y, _ = roc_curve(found.labels[i], found.scores[i])
        axes.plot(x, y, lw=1)
        axes.plot([0, 1], [0, 1], lw=0.5, color="gray")

    def calibration(axes: Axes, i: int) -> None:
        y, x = calibration_curve(found.labels[i], found.probabilities[i], n_bins=10)
        axes.plot(x, y, ".-", lw=1, ms=3)
        axes.plot([0, 1], [0, 1], lw=0.5, color="gray")

    grid("ROC, AUC in the title", rows, "auc", columns, roc).savefig(out / "roc.png")
    grid("calibration, error in the title", rows, "calibration_error", columns, calibration).savefig(
        out / "calibration.png"
    )
    for limit in (0.5, 0.1):

        def confusion(axes: Axes, i: int, limit: float = limit) -> None:
            table = confusion_matrix(found.labels[i], found.probabilities[i] > limit, labels=[False, True])
            picture = axes.imshow(numpy.log1p(table), cmap="Blues")
            for (r, c), count in numpy.ndenumerate(table):
                color = "white" if picture.norm(math.log1p(count)) > 0.6 else "black"
                axes.text(c, r, str(count), ha="center", va="center", fontsize=5, color=color)

        title = (
            f"tokens by label (rows: no, yes) and gate (columns: no, yes) at p = {limit}\n"
            "above each: layer.head and sensitivity"
        )
        grid(title, rows, f"sensitivity_{limit}", columns, confusion).savefig(out / f"confusion_{limit}.png")
    head_maps(rows, gates.model.num_kv_heads).savefig(out / "heads.png")
    if losses.is_file():
        loss_curve(losses).savefig(out / "loss.png")


def grid(title: str, rows: list[dict[str, Any]], name: str, columns: int, draw: Callable[[Axes, int], None]) -> Figure:
    """One small picture per head; heads without both labels stay empty."""
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(CELL * columns, CELL * 1.2 * lines), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=8)
    for i, row in enumerate(rows):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.set_xticks([])
        axes.set_yticks([])
        value = row[name]
        axes.set_title(f"{row['layer']}.{row['head']}" + ("" if value is None else f" {value:.2f}"), fontsize=5, pad=1)
        if row["auc"] is not None:
            draw(axes, i)
    return figure


def head_maps(rows: list[dict[str, Any]], num_kv_heads: int) -> Figure:
    """AUC and retention at p = 0.1, layers by heads."""
    layers = len(rows) // num_kv_heads
    figure = Figure(figsize=(2 * (1.5 + 0.3 * num_kv_heads), 1.5 + 0.2 * layers), layout="constrained", dpi=90)
    for place, name in enumerate(("auc", "retention_0.1")):
        axes = figure.add_subplot(1, 2, place + 1)
        table = numpy.array([math.nan if row[name] is None else row[name] for row in rows]).reshape(layers, -1)
        picture = axes.imshow(table, aspect="auto", cmap="viridis", vmax=1 if name == "auc" else None)
        axes.set_title(name)
        axes.set_xlabel("KV head")
        axes.set_ylabel("layer")
        figure.colorbar(picture, ax=axes)
    return figure


def loss_curve(path: Path) -> Figure:
    """Loss by epoch."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(5, 3), layout="constrained", dpi=90)
    axes = figure.add_subplot()
    for name in ("train", "valid", "best"):
        axes.plot([int(row["epoch"]) for row in rows], [float(row[name]) for row in rows], label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss, mean over heads")
    axes.legend()
    return figure
