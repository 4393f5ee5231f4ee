"""decode_attention over a packed cache, cold, against torch on an uncompressed one.

python -m bench.decode_attention --bits 4 --kv-len 32768 --heads 32 --kv-heads 8 --head-dim 128 --threads 2
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from bench.common import copies_for_cold_cache, median_seconds, read_bandwidth, show
from smartkv_ext import ops


def packed_calls(bits: int, kv_len: int, heads: int, kv_heads: int, head_dim: int, return_mass: bool = False):
    """(calls that attend over separate copies, packed bytes of one copy)."""
    k, v = torch.randn(2, 1, kv_heads, kv_len, head_dim).to(torch.bfloat16)
    positions = torch.arange(kv_len, dtype=torch.int32).expand(1, kv_heads, -1).contiguous()
    mean = k.float().mean(2)
    pages = ops.quantize_kv(k, v, mean, positions, torch.zeros(1, kv_heads, kv_len), bits).flatten(0, 2)
    table = torch.arange(len(pages), dtype=torch.int32).view(1, kv_heads, 1, -1)
    lengths = torch.full((1, kv_heads, 1), kv_len, dtype=torch.int32)
    window = torch.empty(1, kv_heads, 0, head_dim, dtype=torch.bfloat16)
    none = torch.empty(1, 0, dtype=torch.int32)
    q = torch.randn(1, heads, 1, head_dim).to(torch.bfloat16)

    def call(pool):
        return lambda: ops.decode_attention(
            q, [pool], table, lengths, mean, window, window, none, kv_len, [bits], return_mass=return_mass
        )

    return [call(pages.clone()) for _ in range(copies_for_cold_cache(pages.nbytes))], pages.nbytes


def torch_rivals(kv_len: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, float]:
    """Seconds of torch's ways to do the same over an uncompressed cache."""
    groups = heads // kv_heads
    rivals = {}
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(1, heads, 1, head_dim, dtype=dtype)
        k = torch.randn(1, kv_heads, kv_len, head_dim, dtype=dtype)
        copies = [
            (torch.randn_like(k), torch.randn_like(k)) for _ in range(min(4, copies_for_cold_cache(2 * k.nbytes)))
        ]

        def repeated(k, v, q=q):
            return F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))

        def grouped(k, v, q=q):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def folded(k, v, q=q):
            rows = q.view(1, kv_heads, groups, head_dim)
            return torch.softmax(rows @ k.transpose(2, 3) * head_dim**-0.5, -1) @ v

        name = str(dtype).removeprefix("torch.")
        for label, function in (("sdpa repeated", repeated), ("sdpa gqa", grouped), ("folded matmul", folded)):
            calls = [lambda k=k, v=v, f=function: f(k, v) for k, v in copies]
            rivals[f"{label} {name}"] = median_seconds(calls, 0.5)
    return rivals


def main(
    bits: Annotated[list[int], typer.Option(help="tiers to measure")] = [2, 3, 4, 8, 16],  # noqa: B006
    kv_len: int = 32768,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    threads: int = 2,
) -> None:
    """Print a table and one JSON line; times in microseconds, cold operands, medians."""
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    rivals = torch_rivals(kv_len, heads, kv_heads, head_dim)
    best = min((seconds, name) for name, seconds in rivals.items() if "bfloat16" in name)
    rows, result = (
        [],
        {"bandwidth_gbps": bandwidth / 1e9, "rivals_us": {k: s * 1e6 for k, s in rivals.items()}, "bits": {}},
    )
    for width in bits:
        calls, num_bytes = packed_calls(width, kv_len, heads, kv_heads, head_dim)
        seconds = median_seconds(calls)
        floor = num_bytes / bandwidth
        row = {
            "us": seconds * 1e6,
            "bytes": num_bytes,
            "gbps": num_bytes / seconds / 1e9,
            "floor_us": floor * 1e6,
            "floor_ratio": seconds / floor,
            "speedup_vs_best_torch": best[0] / seconds,
        }
        result["bits"][width] = row
        rows.append({"method": f"packed {width}-bit"} | row)
    for name, seconds in rivals.items():
        size = 2 * kv_heads * kv_len * head_dim * (4 if "float32" in name else 2)
        values = (
            seconds * 1e6,
            size,
            size / seconds / 1e9,
            size / bandwidth * 1e6,
            seconds * bandwidth / size,
            best[0] / seconds,
        )
        rows.append(dict(zip(rows[0], (name, *values), strict=True)))
    title = f"decode, {heads} q / {kv_heads} kv heads, head_dim {head_dim}, {kv_len} tokens, {threads} threads"
    show(f"{title}, read {bandwidth / 1e9:.1f} GB/s", rows, result)


if __name__ == "__main__":
    typer.run(main)
