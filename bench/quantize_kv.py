"""quantize_kv: whole pages of one tier from bfloat16 keys and values, rotation included.

python -m bench.quantize_kv --bits 4 --kv-len 8192 --kv-heads 8 --head-dim 128 --threads 2

Bytes: keys and values read, pages written. ``input_gbps`` counts the bfloat16 keys and values alone.
"""

from __future__ import annotations

from functools import partial

import torch
import typer

from bench import options
from bench.operands import Tokens
from bench.output import tier_label
from bench.rivals import quantize_eagerly, rotation_matrix
from bench.session import Session
from bench.timing import Work
from smartkv_ext import ops


def quantize_calls(session: Session, tokens: Tokens, bits: int) -> Work:
    """Calls on separate copies of keys and values."""
    rest = [x.to(session.device) for x in (tokens.mean, tokens.positions, tokens.scores)]
    calls = [
        partial(ops.quantize_kv, k, v, *rest, bits) for k, v in zip(*session.copies(tokens.k, tokens.v), strict=True)
    ]
    return Work(calls, 2 * tokens.k.nbytes + tokens.pages(bits).nbytes)


def rival_calls(session: Session, tokens: Tokens, bits: int) -> dict[str, Work]:
    """What quantising takes in eager torch."""
    mean = tokens.mean.to(session.device)
    copies = list(zip(*session.copies(tokens.k, tokens.v), strict=True))
    if bits == 16:
        return {"copy": Work([lambda k=k, v=v: (k.clone(), v.clone()) for k, v in copies])}
    works = {}
    for dtype in (torch.bfloat16, torch.float32):
        rotation = rotation_matrix(tokens.k.shape[-1], dtype, session.device)
        calls = [partial(quantize_eagerly, k, v, mean, bits, rotation) for k, v in copies]
        works[f"eager {str(dtype).removeprefix('torch.')}"] = Work(calls)
    return works


def main(
    bits: options.Bits = 4,
    kv_len: options.KvLen = 8192,
    kv_heads: options.KvHeads = 8,
    head_dim: options.HeadDim = 128,
    batch: options.Batch = 1,
    device: options.Device = "cpu",
    threads: options.Threads = 2,
    seconds: options.Seconds = 1.0,
    huge_pages: options.HugePages = False,
    json: options.JsonOnly = False,
    plot: options.Plot = None,
) -> None:
    """Time one tier."""
    session = Session.open("quantize_kv", device, threads, seconds, huge_pages, json, plot)
    tokens = Tokens.random(batch, kv_heads, kv_len, head_dim, session.device)
    case = {"bits": bits, "kv_len": kv_len, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch}
    session.report(
        f"{tier_label(bits)}, {kv_heads} kv heads, head_dim {head_dim}, {kv_len} tokens, batch {batch}",
        quantize_calls(session, tokens, bits), rival_calls(session, tokens, bits), case,
        input_gbps=2 * tokens.k.nbytes / 1e9,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
