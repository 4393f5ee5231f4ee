"""change_basis: rows of keys or queries times the matrix of their KV head.

python -m bench.change_basis --heads 12 --kv-heads 2 --head-dim 128 --tokens 1 --threads 2

Bytes: rows read and written once, matrices and shifts read once. A decode step has one row per head, so the matrices
are nearly all of it. Rivals: eager torch, which casts, multiplies, adds and casts.
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
from smartkv_ext.reference.basis import change_basis as eager


def basis_calls(session: Session, x: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor) -> Work:
    """x (batch, heads, n, head_dim), matrix (kv_heads, head_dim, head_dim), shift (kv_heads, head_dim): calls on
    separate copies."""
    calls = [partial(ops.change_basis, *copy) for copy in zip(*session.copies(x, matrix, shift), strict=True)]
    return Work(calls, 2 * x.nbytes + matrix.nbytes + shift.nbytes)


def main(
    heads: options.Heads = 32,
    kv_heads: options.KvHeads = 8,
    head_dim: options.HeadDim = 128,
    tokens: Annotated[int, typer.Option(min=1, help="rows per head")] = 1,
    batch: options.Batch = 1,
    device: options.Device = "cpu",
    threads: options.Threads = 2,
    seconds: options.Seconds = 1.0,
    huge_pages: options.HugePages = False,
    json: options.JsonOnly = False,
    plot: options.Plot = None,
) -> None:
    """Time one shape, bfloat16."""
    session = Session.open("change_basis", device, threads, seconds, huge_pages, json, plot)
    x = torch.randn(batch, heads, tokens, head_dim).to(torch.bfloat16)
    matrix, shift = torch.randn(kv_heads, head_dim, head_dim), torch.randn(kv_heads, head_dim)
    rival = Work([partial(eager, *copy) for copy in zip(*session.copies(x, matrix, shift), strict=True)])
    case = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "tokens": tokens, "batch": batch}
    title = f"{heads} / {kv_heads} heads, head_dim {head_dim}, {tokens} rows each, batch {batch}"
    session.report(title, basis_calls(session, x, matrix, shift), {"eager": rival}, case)


if __name__ == "__main__":
    typer.run(main)
