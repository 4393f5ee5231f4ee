"""What people read after an answer, and the table of policies."""

from __future__ import annotations

from rich.table import Table

from .run import Answer

NAMES = {"window": "tokens in the window", "evicted": "tokens evicted"}


def size(num_bytes: float) -> str:
    """Decimal megabytes, as budgets are written."""
    return f"{num_bytes / 1e6:,.3f} MB"


def speed(tokens_per_second: float) -> str:
    """A dash where nothing was timed."""
    return f"{tokens_per_second:,.1f} tokens/s" if tokens_per_second else "-"


def percent(share: float) -> str:
    """0.125 -> 12.50 %."""
    return f"{100 * share:.2f} %"


def answer_table(small: Answer, full: Answer | None, dtype: str) -> Table:
    """Bytes by part, tokens by tier and speeds, beside the full cache, in ``dtype``, where it was run."""
    report, whole = small.after_answer, full.after_answer if full else None
    table = Table(title=f"KV cache of {report['tokens_seen']:,} tokens", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("SmartKV", justify="right")
    if whole:
        table.add_column(f"full, {dtype}", justify="right")
        table.add_column("full, bf16", justify="right")
    for name, count in report["parts"].items():
        if count:
            table.add_row(f"  {name}", size(count))
    other = [size(whole["total_bytes"]), size(whole["full_bytes"])] if whole else []
    table.add_row("bytes", size(report["total_bytes"]), *other, style="bold")
    other = [percent(whole["total_bytes"] / whole["full_bytes"]), percent(1)] if whole else []
    table.add_row("share of full bf16", percent(report["ratio"]), *other)
    table.add_section()
    table.add_row("policy", report["policy"])
    for tier, count in report["tokens_per_tier"].items():
        if count:
            table.add_row(
                NAMES.get(tier, f"tokens at {tier} bits" if tier.isdigit() else f"tokens at {tier}"), f"{count:,.1f}"
            )
    if whole:
        table.add_row("tokens held whole", "", f"{whole['tokens_seen']:,}", f"{whole['tokens_seen']:,}")
    table.add_section()
    for label, name in (("prefill", "prefill_speed"), ("decode", "decode_speed")):
        table.add_row(label, speed(getattr(small, name)), *([speed(getattr(full, name))] if full else []))
    return table


def policy_rows() -> list[dict[str, str]]:
    """Name, what it keeps, where it comes from."""
    from smartkv_ext.policies import POLICIES

    return [{"name": name, "summary": kind.summary, "source": kind.source} for name, kind in POLICIES.items()]


def policy_table(rows: list[dict[str, str]]) -> Table:
    """``policy_rows`` for reading."""
    table = Table("policy", "keeps", "source")
    for row in rows:
        table.add_row(row["name"], row["summary"], row["source"])
    return table
