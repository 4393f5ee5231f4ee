"""dequantize_kv: pages of one tier back to bfloat16 keys and values.

python -m bench.dequantize_kv --bits 4 --kv-len 8192 --kv-heads 8 --head-dim 128 --threads 2

Bytes: pages read, keys and values written. Only the pages are cold: the op allocates what it writes, often in memory
that is still in a cache, so wide tiers can beat the floor, which counts both as cold. ``output_gbps`` counts the
bfloat16 keys and values alone.
"""

from __future__ import annotations

from functools import partial

import torch
import typer

from bench import options
from bench.operands import Tokens
from bench.output import tier_label
from bench.rivals import dequantize_eagerly, quantize_eagerly, rotation_matrix
from bench.session import Session
from bench.timing import Work
from smartkv_ext import ops


def dequantize_calls(session: Session, tokens: Tokens, bits: int) -> Work:
    """Calls on separate copies of the pages."""
    mean, head_dim = tokens.mean.to(session.device), tokens.k.shape[-1]
    pages = tokens.pages(bits)
    calls = [
        partial(ops.dequantize_kv, copy, mean, head_dim, bits, "gaussian", torch.bfloat16)
        for copy in session.copies(pages)[0]
    ]
    return Work(calls, pages.nbytes + 2 * tokens.k.nbytes)


def rival_calls(session: Session, tokens: Tokens, bits: int) -> dict[str, Work]:
    """What dequantising takes in eager torch."""
    if bits == 16:
        pairs = zip(*session.copies(tokens.k, tokens.v), strict=True)
        return {"copy": Work([lambda k=k, v=v: (k.clone(), v.clone()) for k, v in pairs])}
    works = {}
    for dtype in (torch.bfloat16, torch.float32):
        rotation = rotation_matrix(tokens.k.shape[-1], dtype, session.device)
        packed = quantize_eagerly(tokens.k, tokens.v, tokens.mean, bits, rotation)
        mean = tokens.mean.to(session.device)
        calls = [
            partial(dequantize_eagerly, *copy, mean, bits, rotation)
            for copy in zip(*session.copies(*packed), strict=True)
        ]
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
    session = Session.open("dequantize_kv", device, threads, seconds, huge_pages, json, plot)
    tokens = Tokens.random(batch, kv_heads, kv_len, head_dim, session.device)
    case = {"bits": bits, "kv_len": kv_len, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch}
    session.report(
        f"{tier_label(bits)}, {kv_heads} kv heads, head_dim {head_dim}, {kv_len} tokens, batch {batch}",
        dequantize_calls(session, tokens, bits), rival_calls(session, tokens, bits), case,
        output_gbps=2 * tokens.k.nbytes / 1e9,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
