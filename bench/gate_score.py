"""gate_score: a small MLP per layer and head on the keys.

python -m bench.gate_score --hidden 256 --kv-len 8192 --layers 1 --kv-heads 8 --head-dim 128 --threads 2

It is bound by arithmetic: ``gflops`` of the op stands beside what torch's matmul reaches in the same run, in bfloat16
and float32, the better of a 2048 x 2048 square and the shape of the gate's widest layer. Bytes: keys and weights.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Annotated

import torch
import typer

from bench import options
from bench.session import Session, rival_rows, table_row
from bench.timing import Work
from smartkv_ext import ops

SQUARE = 2048


def random_gate(layers: int, kv_heads: int, sizes: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(weights, biases) of gate_score."""
    weights = [torch.randn(layers, kv_heads, o, i) * i**-0.5 for i, o in itertools.pairwise(sizes)]
    return weights, [torch.randn(layers, kv_heads, o) for o in sizes[1:]]


def gate_calls(session: Session, keys: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> Work:
    """keys (layers, batch, num_kv_heads, n, head_dim): calls on separate copies of them."""
    gate = [x.to(session.device) for x in weights], [x.to(session.device) for x in biases]
    calls = [partial(ops.gate_score, list(copy.unbind(0)), *gate) for copy in session.copies(keys)[0]]
    return Work(calls, keys.nbytes + sum(x.nbytes for x in (*weights, *biases)))


def eager_gate(keys: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """keys (matrices, n, head_dim), weights (matrices, in, out), biases (matrices, 1, out)."""
    x = keys
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.baddbmm(bias, x, weight)
        x = x.relu_() if i + 1 < len(weights) else x
    return x


def rival_calls(
    session: Session, keys: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]
) -> dict[str, Work]:
    """Batched matmuls over layers, sequences and heads, on keys and weights that are already in the right dtype."""
    works = {}
    for dtype in (torch.bfloat16, torch.float32):
        size = keys.shape[:3]
        w = [x[:, None].expand(*size, -1, -1).flatten(0, 2).transpose(1, 2).to(session.device, dtype) for x in weights]
        b = [x[:, None, :, None].expand(*size, -1, -1).flatten(0, 2).to(session.device, dtype) for x in biases]
        calls = [partial(eager_gate, copy.flatten(0, 2), w, b) for copy in session.copies(keys.to(dtype))[0]]
        works[f"baddbmm {str(dtype).removeprefix('torch.')}"] = Work(calls)
    return works


def matmul_gflops(session: Session, rows: int, width: int) -> dict[str, float]:
    """GFLOP/s of torch's matmul, bfloat16 and float32: the better of a square and (rows, width) by (width, width)."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        rates = []
        for m, k in ((SQUARE, SQUARE), (rows, width)):
            a = torch.randn(m, k, device=session.device).to(dtype)
            b = torch.randn(k, k, device=session.device).to(dtype)
            rates.append(2 * m * k * k / session.median(Work([partial(torch.mm, a, b)])) / 1e9)
        found[str(dtype).removeprefix("torch.")] = max(rates)
    return found


def main(
    hidden: Annotated[int, typer.Option(min=1, help="width of the hidden layers")] = 256,
    depth: Annotated[int, typer.Option(min=2, max=3, help="linear layers")] = 3,
    layers: Annotated[int, typer.Option(min=1, help="layers of the model in one call")] = 1,
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
    """Time one shape."""
    session = Session.open("gate_score", device, threads, seconds, huge_pages, json, plot)
    sizes = (head_dim, *(hidden,) * (depth - 1), 1)
    keys = torch.randn(layers, batch, kv_heads, kv_len, head_dim, device=session.device).to(torch.bfloat16)
    weights, biases = random_gate(layers, kv_heads, sizes)
    work = gate_calls(session, keys, weights, biases)
    times = session.times({"gate_score": work}, session.rivals(rival_calls(session, keys, weights, biases)))
    figures = times.figures("gate_score", work.num_bytes)
    peak = matmul_gflops(session, kv_len, hidden)
    flops = 2 * layers * batch * kv_heads * kv_len * sum(a * b for a, b in itertools.pairwise(sizes))
    rates = {
        "gflops": flops / times.works["gate_score"] / 1e9,
        "matmul_bf16_gflops": peak["bfloat16"],
        "matmul_fp32_gflops": peak["float32"],
    }
    case = {
        "hidden": hidden, "depth": depth, "layers": layers, "kv_len": kv_len, "kv_heads": kv_heads,
        "head_dim": head_dim, "batch": batch,
    }  # fmt: skip
    rows = [table_row("gate_score", figures) | {"gflops": rates["gflops"]}]
    rows += [row | {"gflops": flops / row["us"] / 1e3} for row in rival_rows(figures)]
    rows += [{"method": f"torch: plain matmul {name}", "gflops": rate} for name, rate in peak.items()]
    title = f"{' -> '.join(map(str, sizes))}, {layers} layers, {kv_heads} kv heads, {kv_len} tokens, batch {batch}"
    session.show(title, rows, session.context(**case) | figures | rates)


if __name__ == "__main__":
    typer.run(main)
