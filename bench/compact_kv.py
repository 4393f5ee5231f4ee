"""compact_kv: evict a random share of the records of one tier and close the holes.

python -m bench.compact_kv --bits 4 --keep 0.5 --kv-len 8192 --kv-heads 8 --head-dim 128 --threads 2

Bytes are those of the records that move, read once and written once: of n records with m survivors these are the
survivors behind the first m slots, about n / 4 where half is kept. A record is a 64th of a page: codes of key and
value, scales, position, score. The targets (n bytes) are not counted. Pages and lengths are put back, untimed.

Rivals: torch.index_select on an array of whole records, once of as many records as move ("same bytes"), once of all
survivors into another array, which is how a cache without pages would be compacted. Their output is cold too.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer

from bench import options
from bench.operands import Packed, Tokens, uniform_cache
from bench.output import tier_label
from bench.session import Session
from bench.timing import Work
from smartkv_ext import ops
from smartkv_ext.reference.layout import PAGE_SIZE


def random_targets(cache: Packed, keep: float) -> torch.Tensor:
    """(batch, num_kv_heads, 1, slots) int8: 0 for exactly ``keep`` of the records of a list, -1 for the others."""
    slots = cache.block_table.shape[3] * PAGE_SIZE
    n = int(cache.lengths.max())
    rank = torch.rand(*cache.lengths.shape, n).argsort(-1).argsort(-1)
    kept = torch.where(rank < round(keep * n), 0, -1).to(torch.int8)
    return torch.nn.functional.pad(kept, (0, slots - n), value=-1)


def moved_records(targets: torch.Tensor) -> int:
    """Survivors that do not already lie in the front slots, which hold them all afterwards."""
    kept = targets >= 0
    front = torch.arange(targets.shape[-1]) < kept.sum(-1, keepdim=True)
    return int((kept & ~front).sum())


def compact_calls(session: Session, cache: Packed, targets: torch.Tensor) -> Work:
    """Calls on separate copies of the pages, each of which starts as ``cache`` every time."""
    pool, table, start = (x.to(session.device) for x in (cache.pools[0], cache.block_table, cache.lengths))
    mean, where = cache.mean.to(session.device), targets.to(session.device)
    pools = session.copies(cache.pools[0])[0]
    lengths = [start.clone() for _ in pools]
    calls = [
        partial(ops.compact_kv, [copy], table, length, where, mean, cache.tier_bits, "gaussian", torch.bfloat16)
        for copy, length in zip(pools, lengths, strict=True)
    ]

    def restore(i: int) -> None:
        lengths[i].copy_(start)
        pools[i].copy_(pool)

    record = cache.pools[0].shape[1] // PAGE_SIZE
    return Work(calls, 2 * moved_records(targets) * record, restore)


def rival_calls(session: Session, cache: Packed, targets: torch.Tensor) -> dict[str, Work]:
    """Gathers of whole records."""
    records = cache.pools[0].view(-1, cache.pools[0].shape[1] // PAGE_SIZE)
    survivors = torch.randperm(len(records))[: int((targets >= 0).sum())].sort().values
    copies = session.copies(records)[0]
    works = {}
    for name, count in (("same bytes", moved_records(targets)), ("all survivors", len(survivors))):
        index = survivors[torch.randperm(len(survivors))[:count].sort().values].to(session.device)
        outputs = session.copies(records[:count])[0]
        calls = [partial(torch.index_select, copies[i % len(copies)], 0, index, out=y) for i, y in enumerate(outputs)]
        works[f"index_select, {name}"] = Work(calls)
    return works


def main(
    bits: options.Bits = 4,
    keep: Annotated[float, typer.Option(help="share of the records that survives")] = 0.5,
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
    session = Session.open("compact_kv", device, threads, seconds, huge_pages, json, plot)
    cache = uniform_cache(Tokens.random(batch, kv_heads, kv_len, head_dim, session.device), bits)
    targets = random_targets(cache, keep)
    moved = moved_records(targets)
    case = {
        "bits": bits, "keep": keep, "kv_len": kv_len, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch,
        "moved_records": moved,
    }  # fmt: skip
    shape = f"{kv_heads} kv heads, head_dim {head_dim}, {kv_len} tokens"
    session.report(
        f"{tier_label(bits)}, {shape}, keep {keep:g}: {moved:,} records move",
        compact_calls(session, cache, targets), rival_calls(session, cache, targets), case,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
