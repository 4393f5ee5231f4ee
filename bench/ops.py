"""The other ops on a CPU: bytes, floor and the best torch way to do the same.

python -m bench.ops --kv-len 8192 --kv-heads 8 --head-dim 128
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import typer

from bench.common import copies_for_cold_cache, median_seconds, read_bandwidth, show
from smartkv_ext import ops, reference
from smartkv_ext.reference.layout import page_layout
from smartkv_ext.reference.levels import RELATIVE_DISTORTION

TIERS = (2, 3, 4, 8, 16)


def measure(
    name: str, num_bytes: int, calls: list[Callable[[], Any]], rival: Callable[[], Any] | None, bandwidth: float
):
    """One row: bytes are what must be read and written once."""
    seconds = median_seconds(calls, 0.7)
    other = median_seconds([rival], 0.7) if rival else float("nan")
    return {
        "op": name, "us": seconds * 1e6, "bytes": num_bytes, "gbps": num_bytes / seconds / 1e9,
        "floor_us": num_bytes / bandwidth * 1e6, "floor_ratio": seconds * bandwidth / num_bytes,
        "torch_us": other * 1e6, "speedup_vs_torch": other / seconds,
    }  # fmt: skip


def page_ops(kv_len: int, kv_heads: int, head_dim: int, bandwidth: float):
    """quantize_kv, dequantize_kv, append_kv and compact_kv, 4 bit."""
    k, v = torch.randn(2, 1, kv_heads, kv_len, head_dim).to(torch.bfloat16)
    mean = k.float().mean(2)
    positions = torch.arange(kv_len, dtype=torch.int32).expand(1, kv_heads, -1).contiguous()
    scores = torch.rand(1, kv_heads, kv_len)
    pages = ops.quantize_kv(k, v, mean, positions, scores, 4)
    moved = 2 * k.nbytes + pages.nbytes
    copies = range(min(8, copies_for_cold_cache(moved)))
    inputs = [(k.clone(), v.clone()) for _ in copies]
    packed = [pages.clone() for _ in copies]
    yield measure(
        "quantize_kv 4 bit", moved,
        [lambda k=k, v=v: ops.quantize_kv(k, v, mean, positions, scores, 4) for k, v in inputs],
        lambda: reference.quantize_kv(k, v, mean, positions, scores, 4, "gaussian"), bandwidth,
    )  # fmt: skip
    yield measure(
        "dequantize_kv 4 bit", moved,
        [lambda p=p: ops.dequantize_kv(p, mean, head_dim, 4, "gaussian", torch.bfloat16) for p in packed],
        lambda: reference.dequantize_kv(pages, mean, head_dim, 4, "gaussian", torch.bfloat16), bandwidth,
    )  # fmt: skip

    table = torch.arange(pages.shape[2] * kv_heads, dtype=torch.int32).view(1, kv_heads, 1, -1)
    tiers = torch.zeros(1, kv_heads, kv_len, dtype=torch.int8)
    pools = [p.flatten(0, 2) for p in packed]

    def append(k, v, pool):
        lengths = torch.zeros(1, kv_heads, 1, dtype=torch.int32)
        ops.append_kv([pool], table, lengths, k, v, mean, positions, scores, tiers, [4])

    yield measure(
        "append_kv 4 bit",
        moved,
        [lambda a=a, p=p: append(*a, p) for a, p in zip(inputs, pools, strict=True)],
        None,
        bandwidth,
    )
    keep = torch.where(torch.rand(1, kv_heads, 1, pages.shape[2] * 64) < 0.5, 0, -1).to(torch.int8)
    survivors = [p.flatten(0, 2) for p in packed]

    def compact(pool):
        lengths = torch.full((1, kv_heads, 1), kv_len, dtype=torch.int32)
        ops.compact_kv([pool], table, lengths, keep, mean, [4], "gaussian", torch.bfloat16)

    index = keep[0, 0, 0].nonzero().flatten()
    records = pages[0, :, :, : pages.shape[3] // 2].reshape(kv_heads, -1, page_layout(4, head_dim).page_bytes // 128)
    yield measure(
        "compact_kv keep half", pages.nbytes // 2, [lambda p=p: compact(p) for p in survivors],
        lambda: records.index_select(1, index), bandwidth,
    )  # fmt: skip


def score_ops(kv_len: int, kv_heads: int, head_dim: int, bandwidth: float):
    """attention_mass, gate_score, select_kv and merge_states."""
    k = torch.randn(1, kv_heads, kv_len, head_dim).to(torch.bfloat16)
    q = torch.randn(1, kv_heads * 4, 32, head_dim).to(torch.bfloat16)
    positions = torch.arange(kv_len, dtype=torch.int32)[None]
    arguments = (q, k, positions, kv_len - 32, head_dim**-0.5)
    yield measure(
        "attention_mass 32 queries", k.nbytes, [lambda: ops.attention_mass(*arguments)],
        lambda: reference.attention_mass(*arguments), bandwidth,
    )  # fmt: skip
    sizes = (head_dim, 256, 256, 1)
    weights = [torch.randn(1, kv_heads, o, i) * i**-0.5 for i, o in itertools.pairwise(sizes)]
    biases = [torch.randn(1, kv_heads, o) for o in sizes[1:]]

    def batched():
        x = k[0].float()
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            x = torch.baddbmm(b[0, :, None], x, w[0].transpose(1, 2))
            x = x.relu() if i < 2 else x
        return x

    row = measure("gate_score 3 layers", k.nbytes, [lambda: ops.gate_score([k], weights, biases)], batched, bandwidth)
    flops = 2 * kv_heads * kv_len * sum(a * b for a, b in itertools.pairwise(sizes))
    yield row | {"op": f"gate_score 3 layers, {flops / row['us'] / 1e3:.0f} GFLOP/s"}
    scores = torch.rand(kv_heads, 1, kv_len)
    current = torch.full(scores.shape, len(TIERS), dtype=torch.int8)
    page_bytes = [page_layout(bits, head_dim).page_bytes for bits in TIERS]
    budgets = torch.full((kv_heads,), kv_len * head_dim // 2)
    distortion = [RELATIVE_DISTORTION[bits] for bits in TIERS]
    yield measure(
        "select_kv", scores.nbytes, [lambda: ops.select_kv(scores, current, budgets, page_bytes, distortion)],
        lambda: scores.argsort(-1), bandwidth,
    )  # fmt: skip
    o, lse = torch.randn(8, 32, head_dim).to(torch.bfloat16), torch.randn(8, 32)
    yield measure(
        "merge_states 8 x 32",
        o.nbytes,
        [lambda: ops.merge_states(o, lse)],
        lambda: reference.merge_states(o, lse),
        bandwidth,
    )


def main(kv_len: int = 8192, kv_heads: int = 8, head_dim: int = 128, threads: int = 2) -> None:
    """Print a table and one JSON line. torch_us is the same work in eager torch (select: a sort; compact: a gather)."""
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    rows = [*page_ops(kv_len, kv_heads, head_dim, bandwidth), *score_ops(kv_len, kv_heads, head_dim, bandwidth)]
    title = f"{kv_heads} kv heads, head_dim {head_dim}, {kv_len} tokens, {threads} threads"
    show(f"{title}, read {bandwidth / 1e9:.1f} GB/s", rows, {"bandwidth_gbps": bandwidth / 1e9, "ops": rows})


if __name__ == "__main__":
    typer.run(main)
