"""What people read after an answer, and the table of policies."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from smartkv_ext.policies import POLICIES

from .run import Answer


def size(num_bytes: float) -> str:
    """Decimal megabytes, as budgets are written."""
    return f"{num_bytes / 1e6:,.3f} MB"


def speed(tokens_per_second: float) -> str:
    """A dash where nothing was timed."""
    return f"{tokens_per_second:,.1f} tokens/s" if tokens_per_second else "-"


def answer_table(small: Answer, full: Answer | None, itemsize: int) -> Table:
    """Bytes by part, tokens by tier and speeds, beside the full cache. itemsize: bytes of the model's dtype."""
    report = small.after_answer
    whole = report["full_bytes"]  # the bf16 cache of the same tokens
    table = Table(title=f"Cache of {report['tokens_seen']:,} tokens", title_justify="left")
    table.add_column("")
    for name in ("SmartKV", "full cache"):
        table.add_column(name, justify="right")
    for name, count in report["parts"].items():
        if count:
            table.add_row(f"  {name}", size(count), "")
    table.add_row("bytes", size(report["total_bytes"]), size(whole * itemsize // 2), style="bold")
    if itemsize != 2:
        table.add_row("bytes, the full cache as bf16", size(report["total_bytes"]), size(whole))
    table.add_row("share of the full bf16 cache", f"{100 * report['ratio']:.2f} %", f"{50 * itemsize:.0f} %")
    table.add_section()
    for tier, count in report["tokens_per_tier"].items():
        if count:
            label = f"tokens at {tier} bits" if tier.isdigit() else f"tokens in the {tier}"
            table.add_row("tokens evicted" if tier == "evicted" else label, f"{count:,.1f}", "")
    table.add_section()
    for label, name in (("prefill", "prefill_speed"), ("decode", "decode_speed")):
        table.add_row(label, speed(getattr(small, name)), speed(getattr(full, name)) if full else "--compare")
    return table


def show_policies(json_line: bool) -> None:
    """Name, what it keeps, where it comes from."""
    rows: list[dict[str, Any]] = [
        {"name": name, "summary": policy.summary, "source": policy.source} for name, policy in POLICIES.items()
    ]
    table = Table("policy", "keeps", "source")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if json_line:
        print(json.dumps(rows), flush=True)
