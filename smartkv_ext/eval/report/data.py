"""Rows of a run, gathered into what the report shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

Row = dict[str, Any]
TEXT_COLUMNS = ("kl", "perplexity", "top1")
LOWER_IS_BETTER = ("kl", "perplexity")


@dataclass(frozen=True)
class Summary:
    """Means of one method on one model over everything that was measured with it.

    Texts and tasks have documents of other lengths and so other bytes: a value has the bytes of its own rows.
    """

    method: str
    family: str
    budget: str | None
    values: dict[str, float]  # kl, perplexity relative to the full cache's, top1, and a score per task
    ratios: dict[str, float]  # bytes / full bytes of the rows behind each value

    @property
    def largest_ratio(self) -> float:
        """What no value has more than."""
        return max(self.ratios.values())

    def get(self, name: str) -> float | None:
        """A value, or None where nothing was measured."""
        return self.values.get(name)


def label(spec: str) -> str:
    """What people read: "snapkv tiers=2,4" for "smartkv policy=snapkv tiers=2,4", and a policy file's name alone."""
    words = spec.removeprefix("smartkv ").replace("policy=", "").split(" ")
    words.sort(key=lambda word: "=" in word)  # the policy first
    return " ".join(PurePath(word).stem if word.endswith((".json", ".yaml")) else word for word in words)


def models(rows: Iterable[Row]) -> list[str]:
    """Names with their dtypes, in the order in which they appear."""
    return list(dict.fromkeys(model_of(row) for row in rows))


def model_of(row: Row) -> str:
    """ "smollm2, bfloat16", and how it was asked."""
    return f"{row['model']}, {row['dtype']}" + (", query-aware" if row["query_aware"] else "")


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """One per method, in order of bytes. The rows are those of one model."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] in ("text", "question"):
            groups.setdefault(row["method"], []).append(row)
    return sorted((_summary(method, found) for method, found in groups.items()), key=lambda s: s.largest_ratio)


def _summary(method: str, rows: list[Row]) -> Summary:
    columns: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "text":
            found = {"kl": row["kl"], "top1": row["top1"], "perplexity": row["nll"] - row["full_nll"]}
        else:
            found = {row["task"]: row["score"]}
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
            ratios.setdefault(name, []).append(row["ratio"])
    values = {name: statistics.fmean(column) for name, column in columns.items()}
    if "perplexity" in values:
        values["perplexity"] = math.exp(values["perplexity"])
    means = {name: statistics.fmean(column) for name, column in ratios.items()}
    return Summary(method, rows[0]["family"], rows[0]["budget"], values, means)


def task_names(found: Iterable[Summary]) -> list[str]:
    """Tasks that have scores, in order of appearance."""
    return list(dict.fromkeys(name for s in found for name in s.values if name not in TEXT_COLUMNS))


def best(found: list[Summary], name: str) -> float | None:
    """The best value of a column, "full" left out."""
    values = [s.values[name] for s in found if name in s.values and s.method != "full"]
    if not values:
        return None
    return min(values) if name in LOWER_IS_BETTER else max(values)


def notable_families(found: list[Summary], count: int = 8) -> list[str]:
    """Families that are best somewhere: on the lower hull of KL and on the upper one of scores, most often first."""
    wins: dict[str, int] = {}
    for name in ["kl", *task_names(found)]:
        measured = [s for s in found if name in s.values and s.method != "full"]
        for s in measured:
            sign = 1 if name in LOWER_IS_BETTER else -1
            rivals = [o for o in measured if o.ratios[name] <= s.ratios[name] * 1.02]
            if sign * s.values[name] <= min(sign * o.values[name] for o in rivals) + 1e-12:
                wins[s.family] = wins.get(s.family, 0) + 1
    return sorted(wins, key=lambda family: -wins[family])[:count]


@dataclass(frozen=True)
class Needles:
    """Recall of one method: score of every depth and length, None where nothing was asked."""

    label: str
    depths: list[int]
    lengths: list[int]
    cells: list[list[float | None]]  # [depth][length]
    mean: float


def needles(rows: Iterable[Row]) -> list[Needles]:
    """One grid per method of the recall rows of one model, best first."""
    cells: dict[str, dict[tuple[int, int], list[float]]] = {}
    for row in rows:
        if row["kind"] == "question" and row["task"] == "recall":
            cells.setdefault(row["method"], {}).setdefault((row["depth"], row["length"]), []).append(row["score"])
    depths = sorted({depth for grid in cells.values() for depth, _ in grid})
    lengths = sorted({length for grid in cells.values() for _, length in grid})
    out = []
    for method, grid in cells.items():
        table = [[statistics.fmean(grid[d, n]) if (d, n) in grid else None for n in lengths] for d in depths]
        mean = statistics.fmean(x for scores in grid.values() for x in scores)
        out.append(Needles(label(method), depths, lengths, table, mean))
    return sorted(out, key=lambda n: -n.mean)
