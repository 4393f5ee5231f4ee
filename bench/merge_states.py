"""merge_states: attention results over disjoint keys into one.

python -m bench.merge_states --states 8 --heads 32 --head-dim 128 --threads 2

Bytes: partial outputs and their log-sum-exp read, the merged ones written. A decode step merges a few hundred kB that
were just computed; the operands here are cold nevertheless, as in every benchmark of this folder.
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


def merge_calls(session: Session, o: torch.Tensor, lse: torch.Tensor) -> Work:
    """o (states, ..., head_dim), lse (states, ...): calls on separate copies."""
    calls = [partial(ops.merge_states, *copy) for copy in zip(*session.copies(o, lse), strict=True)]
    return Work(calls, o.nbytes + lse.nbytes + (o.nbytes + lse.nbytes) // len(o))


def eager_merge(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in eager torch."""
    total = lse.logsumexp(0)
    return ((lse - total).exp()[..., None] * o).sum(0).to(o.dtype), total


def main(
    states: Annotated[int, typer.Option(min=1, help="partial results")] = 8,
    heads: options.Heads = 32,
    head_dim: options.HeadDim = 128,
    batch: options.Batch = 1,
    device: options.Device = "cpu",
    threads: options.Threads = 2,
    seconds: options.Seconds = 1.0,
    huge_pages: options.HugePages = False,
    json: options.JsonOnly = False,
    plot: options.Plot = None,
) -> None:
    """Time one shape, bfloat16."""
    session = Session.open("merge_states", device, threads, seconds, huge_pages, json, plot)
    o = torch.randn(states, batch, heads, head_dim).to(torch.bfloat16)
    lse = torch.randn(states, batch, heads)
    rival = Work([partial(eager_merge, *copy) for copy in zip(*session.copies(o, lse), strict=True)])
    case = {"states": states, "heads": heads, "head_dim": head_dim, "batch": batch}
    title = f"{states} states, {heads} heads, head_dim {head_dim}, batch {batch}"
    session.report(title, merge_calls(session, o, lse), {"eager": rival}, case)


if __name__ == "__main__":
    typer.run(main)
