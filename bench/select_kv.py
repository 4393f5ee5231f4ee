"""select_kv: one byte budget over the tokens of all heads of a group.

python -m bench.select_kv --groups 1 --heads 8 --kv-len 8192 --threads 2

Bytes: scores and present tiers read, tiers written. The rival is torch's sort of as many scores, which the op needs.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer

from bench import options
from bench.session import Session
from bench.timing import Work
from smartkv_ext import ops
from smartkv_ext.quant import TIER_LOSS
from smartkv_ext.reference.layout import TIERS, page_layout


def select_calls(session: Session, scores: torch.Tensor, head_dim: int, budget: float) -> Work:
    """scores (groups, heads, n): calls on separate copies. ``budget``: share of the bytes of 16-bit pages."""
    groups, heads, n = scores.shape
    page_bytes = [page_layout(tier, head_dim).page_bytes for tier in TIERS]
    current = torch.full(scores.shape, len(TIERS), dtype=torch.int8)
    limit = int(budget * heads * n * head_dim * 4)
    budgets = torch.full((groups,), limit, dtype=torch.int64, device=session.device)
    distortion = [TIER_LOSS[tier] for tier in TIERS]
    calls = [
        partial(ops.select_kv, s, c, budgets, page_bytes, distortion)
        for s, c in zip(*session.copies(scores, current), strict=True)
    ]
    return Work(calls, scores.nbytes + 2 * current.nbytes)


def main(
    groups: Annotated[int, typer.Option(min=1, help="budgets: layers or sequences")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="kv heads that share a budget")] = 8,
    kv_len: options.KvLen = 8192,
    head_dim: options.HeadDim = 128,
    budget: Annotated[float, typer.Option(help="share of the bfloat16 bytes")] = 0.125,
    device: options.Device = "cpu",
    threads: options.Threads = 2,
    seconds: options.Seconds = 1.0,
    huge_pages: options.HugePages = False,
    json: options.JsonOnly = False,
    plot: options.Plot = None,
) -> None:
    """Time one shape."""
    session = Session.open("select_kv", device, threads, seconds, huge_pages, json, plot)
    scores = torch.rand(groups, heads, kv_len)
    work = select_calls(session, scores, head_dim, budget)
    flat = [copy.flatten(1) for copy in session.copies(scores)[0]]
    rival = Work([partial(torch.sort, copy, descending=True) for copy in flat])
    case = {"groups": groups, "heads": heads, "kv_len": kv_len, "head_dim": head_dim, "budget": budget}
    title = f"{groups} groups of {heads} heads, {kv_len} tokens, budget {budget:g}"
    session.report(title, work, {"sort": rival}, case)


if __name__ == "__main__":
    typer.run(main)
