"""How results are printed and drawn."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from smartkv_ext.reference.layout import tier_name

FLOOR = "floor: reading and writing the op's bytes once, at the fastest read measured here"


def show(
    title: str, rows: list[dict[str, Any]], result: dict[str, Any], json_only: bool = False, plot: Path | None = None
) -> None:
    """A table for people, then one line of JSON for programs; ``plot``: also a picture of rows that have us, floor_us.

    Raises ValueError for a result that holds NaN or infinity: it is not JSON, and no measurement either.
    """
    line = json.dumps(result, allow_nan=False)
    if plot is not None:
        draw(title, rows, plot)
    if not json_only:
        table = Table(title=title)
        for name in rows[0]:
            table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
        for row in rows:
            table.add_row(*(_text(row.get(name)) for name in rows[0]))
        Console(width=150).print(table)
    print(line, flush=True)


def tier_label(tier: int) -> str:
    """ "4 bit", or "K3V2" for 302."""
    name = tier_name(tier)
    return f"{name} bit" if name == str(tier) else name


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def draw(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of time, log scale, with the floor as a mark where a row has one. Raises SystemExit without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(
            '--plot needs matplotlib: pip install "smartkv-ext[bench]", or pip install matplotlib'
        ) from None
    label = next(iter(rows[0]))
    timed = [row for row in rows if "us" in row]
    figure = Figure(figsize=(9, 1.6 + 0.35 * len(timed)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(timed)), [row["us"] for row in timed], color="tab:blue", label="measured")
    axes.set_yticks(range(len(timed)), [row[label] for row in timed])
    floors = [(i, row["floor_us"]) for i, row in enumerate(timed) if "floor_us" in row]
    axes.plot([us for _, us in floors], [i for i, _ in floors], "|", color="black", ms=16, mew=2, label=FLOOR)
    axes.set_xscale("log")
    axes.set_xlabel("us per call")
    figure.suptitle(textwrap.fill(title, 100), fontsize="medium")  # of the figure: an axes' title may leave it
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.savefig(path)
