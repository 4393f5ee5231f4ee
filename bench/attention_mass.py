"""attention_mass: what the newest queries attend to, over uncompressed keys.

python -m bench.attention_mass --q-len 32 --kv-len 8192 --heads 32 --kv-heads 8 --head-dim 128 --threads 2

Bytes: the keys, read once. It is bound by arithmetic: ``gflops`` counts one product of queries and keys, whatever
number of passes the op makes.
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


def mass_calls(session: Session, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None = None) -> Work:
    """Calls on separate copies of the keys; the queries are the last of the sequence."""
    positions = torch.arange(k.shape[2], dtype=torch.int32, device=session.device).expand(len(k), -1).contiguous()
    q = q.to(session.device)
    start = torch.tensor([k.shape[2] - q.shape[2]], device=session.device)
    calls = [
        partial(ops.attention_mass, q, copy, positions, start, q.shape[-1] ** -0.5, 0, lse)
        for copy in session.copies(k)[0]
    ]
    return Work(calls, k.nbytes)


def eager_mass(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q (batch, kv_heads, groups * q_len, head_dim), mask (groups * q_len, n) -> (batch, kv_heads, n)."""
    return torch.softmax((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask, -1).sum(2)


def rival_calls(session: Session, q: torch.Tensor, k: torch.Tensor) -> dict[str, Work]:
    """Eager torch, with the queries of a group folded into one matrix."""
    groups, q_len, n = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    late = torch.arange(n) > torch.arange(n - q_len, n)[:, None]
    rows = q.unflatten(1, (-1, groups)).flatten(2, 3).to(session.device)
    works = {}
    for dtype in (torch.bfloat16, torch.float32):
        mask = torch.zeros(q_len, n).masked_fill(late, -torch.inf).repeat(groups, 1).to(session.device, dtype)
        calls = [partial(eager_mass, rows.to(dtype), copy, mask) for copy in session.copies(k.to(dtype))[0]]
        works[f"eager {str(dtype).removeprefix('torch.')}"] = Work(calls)
    return works


def main(
    q_len: Annotated[int, typer.Option(min=1, help="queries, the last of the sequence")] = 32,
    kv_len: options.KvLen = 8192,
    heads: options.Heads = 32,
    kv_heads: options.KvHeads = 8,
    head_dim: options.HeadDim = 128,
    batch: options.Batch = 1,
    lse: Annotated[bool, typer.Option("--lse", help="give the op the log-sum-exp: it saves one of two passes")] = False,
    device: options.Device = "cpu",
    threads: options.Threads = 2,
    seconds: options.Seconds = 1.0,
    huge_pages: options.HugePages = False,
    json: options.JsonOnly = False,
    plot: options.Plot = None,
) -> None:
    """Time one shape."""
    session = Session.open("attention_mass", device, threads, seconds, huge_pages, json, plot)
    q = torch.randn(batch, heads, q_len, head_dim).to(torch.bfloat16)
    k = torch.randn(batch, kv_heads, kv_len, head_dim, device=session.device).to(torch.bfloat16)
    # Any finite value costs the same; the true one is near log(kv_len).
    known = torch.full((batch, heads, q_len), 9.0, device=session.device) if lse else None
    case = {
        "q_len": q_len, "kv_len": kv_len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch,
        "lse": lse,
    }  # fmt: skip
    session.report(
        f"{q_len} queries, {heads} q / {kv_heads} kv heads, head_dim {head_dim}, {kv_len} tokens, batch {batch}",
        mass_calls(session, q, k, known), rival_calls(session, q, k), case,
        gflops=2 * q.numel() * kv_len / 1e9,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
