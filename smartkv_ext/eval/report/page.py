"""The page: sections of every model, put into the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from smartkv_ext.eval.runner import read_rows

from . import data
from .maps import KeptMap

MAX_MAPS = 6  # of a model: each brings its document


@dataclass(frozen=True)
class _Column:
    name: str
    title: str
    digits: int
    percent: bool = False

    def show(self, value: float | None) -> str:
        """Text of a cell."""
        if value is None:
            return ""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.{self.digits}f}"


_BYTES = _Column("bytes", "bytes", 1, percent=True)


def write_report(sources: Sequence[Path], out: Path, title: str = "SmartKV: quality at true bytes") -> None:
    """One self-contained HTML file from JSONL files of rows.

    Raises ValueError for files without rows, ImportError where matplotlib or jinja2 is missing.
    """
    from jinja2 import Environment, select_autoescape

    rows = [row for source in sources for row in read_rows(source)]
    if not rows:
        raise ValueError(f"{', '.join(map(str, sources))} must hold rows of `smartkv eval`; there are none")
    template = files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    sections = [_section(name, [r for r in rows if data.model_of(r) == name]) for name in data.models(rows)]
    maps = [token_map for section in sections for token_map in section["token_maps"]]
    html = environment.from_string(template).render(title=title, sections=sections, maps=maps)
    out.write_text(html, encoding="utf-8")


def _section(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from . import figures

    found = data.summaries(rows)
    tasks = data.task_names(found)
    families = data.notable_families(found)
    curves = [column for column in ("kl", *tasks) if any(column in s.values for s in found)]
    maps = [KeptMap.from_row(row) for row in rows if row["kind"] == "map"][:MAX_MAPS]
    return {
        "name": name,
        "rows": len(rows),
        "curves": [(column, figures.pareto(found, column, families)) for column in curves],
        "table": _table(found, tasks),
        "needles": data.needles(rows),
        "maps": [(m, figures.kept_per_head(m), figures.tiers_per_layer(m)) for m in maps],
        "token_maps": [m.for_browser() for m in maps],
    }


def _table(found: list[data.Summary], tasks: list[str]) -> dict[str, Any]:
    columns = [
        _Column("kl", "KL", 4),
        _Column("perplexity", "ppl / full", 3),
        _Column("top1", "top-1", 3, percent=True),
    ]
    columns += [_Column(t, t, 3, percent=True) for t in tasks]
    columns = [c for c in columns if any(c.name in s.values for s in found)]
    groups: dict[str, list[data.Summary]] = {}
    for s in found:
        groups.setdefault(_byte_class(s.largest_ratio), []).append(s)
    out = []
    for label, members in groups.items():
        tops = {c.name: data.best(members, c.name) for c in columns}
        ordered = sorted(members, key=lambda s: s.values.get("kl", s.largest_ratio))
        lines = [[cell for c in columns for cell in _cells(c, s, tops[c.name])] for s in ordered]
        names = [(s.method, data.label(s.family if s.budget else s.method)) for s in ordered]
        out.append({"label": label, "lines": list(zip(names, lines, strict=True))})
    titles = [title for c in columns for title in ([f"{_source(c)} bytes"] if _has_bytes(c) else []) + [c.title]]
    return {"titles": titles, "groups": out}


def _source(column: _Column) -> str:
    """What was measured for it: the texts, or a task."""
    return "text" if column.name in data.TEXT_COLUMNS else column.name


def _has_bytes(column: _Column) -> bool:
    """Whether a column of bytes comes before it: once for the columns of the texts, whose rows are the same."""
    return column.name not in data.TEXT_COLUMNS[1:]


def _cells(column: _Column, summary: data.Summary, top: float | None) -> list[tuple[str, bool]]:
    """Text, and whether it is the best: the bytes where a column of them comes first, then the value."""
    value = summary.get(column.name)
    cells = [(column.show(value), value is not None and value == top)]
    if _has_bytes(column):
        cells.insert(0, (_BYTES.show(summary.ratios.get(column.name)), False))
    return cells


def _byte_class(ratio: float) -> str:
    """Rows that hold about the same: powers of two, up to 10 % above."""
    power = 1
    while ratio * power * 2 <= 1.1:
        power *= 2
    return f"at most 1/{power} of the bytes" if power > 1 else "more than 1/2 of the bytes"
