"""append_kv: tokens behind the lists of a paged cache that already holds some.

python -m bench.append_kv --bits 4 --new 64 --kv-len 8192 --kv-heads 8 --head-dim 128 --threads 2

Bytes: keys and values read, records written (a 64th of a page each). The lengths are put back between calls, untimed.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer

from bench import options
from bench.operands import CPU, Packed, Tokens, uniform_cache
from bench.output import tier_label
from bench.quantize_kv import rival_calls
from bench.session import Session
from bench.timing import Work
from smartkv_ext import ops
from smartkv_ext.reference.layout import PAGE_SIZE


def append_calls(session: Session, cache: Packed, new: Tokens) -> Work:
    """Calls that append ``new`` to separate copies of ``cache``, whose pages have room for it behind ``lengths``."""
    table, start = cache.block_table.to(session.device), cache.lengths.to(session.device)
    rest = [x.to(session.device) for x in (new.mean, new.positions, new.scores)]
    tiers = torch.zeros(new.scores.shape, dtype=torch.int8, device=session.device)
    pools, ks, vs = session.copies(cache.pools[0], new.k, new.v)
    lengths = [start.clone() for _ in pools]
    calls = [
        partial(ops.append_kv, [pool], table, length, k, v, *rest, tiers, cache.tier_bits)
        for pool, length, k, v in zip(pools, lengths, ks, vs, strict=True)
    ]
    records = new.scores.numel() * cache.pools[0].shape[1] // PAGE_SIZE
    return Work(calls, 2 * new.k.nbytes + records, restore=lambda i: lengths[i].copy_(start))


def cache_with_room(
    kv_len: int, new: int, batch: int, kv_heads: int, head_dim: int, bits: int, device: torch.device = CPU
) -> Packed:
    """kv_len records per list, in pages that have room for ``new`` more."""
    cache = uniform_cache(Tokens.random(batch, kv_heads, kv_len + new, head_dim, device), bits)
    cache.lengths.fill_(kv_len)
    return cache


def main(
    bits: options.Bits = 4,
    new: Annotated[int, typer.Option(min=1, help="tokens appended in one call")] = 64,
    kv_len: Annotated[int, typer.Option(min=0, help="tokens in the cache before")] = 8192,
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
    """Time one tier. 64 new tokens is what the cache packs at a time; many, with --kv-len 0, is a prefill."""
    session = Session.open("append_kv", device, threads, seconds, huge_pages, json, plot)
    cache = cache_with_room(kv_len, new, batch, kv_heads, head_dim, bits, session.device)
    tokens = Tokens.random(batch, kv_heads, new, head_dim, session.device)
    case = {"bits": bits, "new": new, "kv_len": kv_len, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch}
    session.report(
        f"{tier_label(bits)}, {kv_heads} kv heads, head_dim {head_dim}, {new} tokens behind {kv_len}, batch {batch}",
        append_calls(session, cache, tokens), rival_calls(session, tokens, bits), case,
        input_gbps=2 * tokens.k.nbytes / 1e9,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
