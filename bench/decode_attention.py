"""decode_attention over a packed cache, cold, against torch on an uncompressed one.

python -m bench.decode_attention --bits 4 --kv-len 32768 --heads 32 --kv-heads 8 --head-dim 128 --threads 2
python -m bench.decode_attention --bits 4 --bits 8 --mix --mass --error --json
python -m bench.decode_attention --bits 4 --kv-len 8192 --window 128

Bytes are those of the pages and of the dense window, which holds the last of the ``kv_len`` tokens; queries, tables and
the output are less than 1 % of them. Every query is behind all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer

from bench import options
from bench.operands import Packed, Tokens, mixed_cache, uniform_cache
from bench.output import tier_label
from bench.rivals import attention_rivals, attention_ways
from bench.session import Session, Times, rival_rows, table_row
from bench.timing import Work
from smartkv_ext import ops
from smartkv_ext.reference.layout import TIERS


def attention_calls(
    session: Session, cache: Packed, q: torch.Tensor, window_len: int = 0, turns: int = 0, **keywords: Any
) -> Work:
    """Calls that attend over separate copies of the pages and of a dense window behind them."""
    batch, kv_heads, _, head_dim = (*cache.lengths.shape, q.shape[-1])
    table, lengths, mean = (x.to(session.device) for x in (cache.block_table, cache.lengths, cache.mean))
    q = q.to(session.device)
    windows = torch.randn(2, batch, kv_heads, window_len, head_dim).to(q)
    first = cache.q_start
    positions = torch.arange(first, first + window_len, dtype=torch.int32, device=session.device).expand(batch, -1)
    start = torch.tensor([first + window_len], device=session.device)
    if turns:  # as if the pages had been written with them: what they cost does not depend on it
        shape = (batch, kv_heads, turns)
        keywords["k_turns"] = torch.randn(*shape, 2, head_dim, device=session.device).half()
        keywords["turn_steps"] = torch.randint(2**30, shape, dtype=torch.int32, device=session.device)

    def call(dense: torch.Tensor, *pools: torch.Tensor) -> Any:
        return ops.decode_attention(
            q, pools, table, lengths, mean, *dense, positions, start, cache.tier_bits, **keywords
        )

    copies = zip(*session.copies(windows, *cache.pools), strict=True)
    return Work([partial(call, *tensors) for tensors in copies], cache.num_bytes + windows.nbytes)


def relative_errors(
    cache: Packed, tokens: Tokens, q: torch.Tensor, out: torch.Tensor, levels: str = "gaussian"
) -> tuple[float, float]:
    """Relative L2 errors of ``out``, and of torch's eager bfloat16 attention, on the dequantised cache.

    The yardstick is float64 attention over the keys and values that each of the two was given: eager torch gets the
    dequantised ones rounded to bfloat16, and that rounding is not held against it.
    """
    bits, n, groups = cache.tier_bits[0], tokens.k.shape[2], q.shape[1] // tokens.k.shape[1]
    pages = cache.pools[0].cpu().view(*cache.block_table.shape[:2], -1, cache.pools[0].shape[1])
    stored = torch.bfloat16 if bits == 16 else torch.float32
    k, v = (x[:, :, :n] for x in ops.dequantize_kv(pages, cache.mean.cpu(), q.shape[-1], bits, levels, stored))
    attend = attention_ways(groups)["folded matmul"]

    def exact(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = zip(q.double().split(groups, 1), k.split(1, 1), v.split(1, 1), strict=True)  # one at a time: memory
        return torch.cat([attend(q, k.double(), v.double()) for q, k, v in heads], 1)

    def error(x: torch.Tensor, truth: torch.Tensor) -> float:
        return ((x.double() - truth).norm() / truth.norm()).item()

    rounded = k.to(torch.bfloat16), v.to(torch.bfloat16)
    return error(out.cpu(), exact(k, v)), error(attend(q, *rounded), exact(*rounded))


@dataclass(frozen=True)
class Measured:
    """One tier: the times of "packed" and what else was asked for, and their bytes."""

    bits: int
    times: Times
    num_bytes: dict[str, int]
    errors: tuple[float, float] | None

    def fields(self) -> dict[str, Any]:
        """For the JSON. Ratios are to the uniform cache without mass; ragged and mixed ones per byte."""
        seconds, sizes = self.times.works, self.num_bytes
        fields = {"bits": self.bits} | self.times.figures("packed", sizes["packed"])
        if "mass" in seconds:
            fields |= {"mass_us": seconds["mass"] * 1e6, "mass_ratio": seconds["mass"] / seconds["packed"]}
        for name in ("ragged", "mix"):
            if name in seconds:
                ratio = seconds[name] / sizes[name] / (seconds["packed"] / sizes["packed"])
                fields |= {f"{name}_us": seconds[name] * 1e6, f"{name}_bytes": sizes[name], f"{name}_ratio": ratio}
        if self.errors is not None:
            fields |= dict(zip(("error", "error_torch_bf16"), self.errors, strict=True))
        return fields

    def rows(self) -> list[dict[str, Any]]:
        """For the table."""
        names = {"packed": "", "mass": ", with mass", "ragged": ", ragged", "mix": f", ragged, {len(TIERS)} tiers"}
        rows = [
            table_row(f"{tier_label(self.bits)}{names[name]}", self.times.figures(name, self.num_bytes[name]))
            for name in self.times.works
        ]
        if self.errors is not None:
            rows[0] |= dict(zip(("error", "torch bf16's"), self.errors, strict=True))
        return rows


def measure(
    session: Session,
    bits: int,
    tokens: Tokens,
    q: torch.Tensor,
    rivals: tuple[dict[str, float], Work],
    extras: dict[str, bool],
    keywords: dict[str, Any],
) -> Measured:
    """Time one tier. ``extras``: which of mix, mass and error to add."""
    cache = uniform_cache(tokens, bits)
    works = {"packed": attention_calls(session, cache, q, **keywords)}
    if extras["mass"]:
        works["mass"] = attention_calls(session, cache, q, return_mass=True, **keywords)
    if extras["mix"]:
        batch, kv_heads, _, head_dim = tokens.k.shape
        for name, tiers in (("ragged", (bits,)), ("mix", TIERS)):
            mixed = mixed_cache(cache.num_bytes, batch, kv_heads, head_dim, tiers, session.device)
            works[name] = attention_calls(session, mixed, q, **keywords)
    times = session.times(works, rivals)
    errors = None
    if extras["error"]:
        errors = relative_errors(cache, tokens, q, works["packed"].calls[0]()[0])
    return Measured(bits, times, {name: work.num_bytes for name, work in works.items()}, errors)


def main(
    bits: Annotated[list[int], typer.Option(help="tier; give several for several cases")] = [4],  # noqa: B006
    kv_len: options.KvLen = 32768,
    heads: options.Heads = 32,
    kv_heads: options.KvHeads = 8,
    head_dim: options.HeadDim = 128,
    q_len: Annotated[int, typer.Option(min=1, max=8, help="queries per sequence (speculative decoding)")] = 1,
    batch: options.Batch = 1,
    precision: Annotated[str | None, typer.Option(help="fp32, int16 or int8; default: the op's own")] = None,
    mix: Annotated[
        bool, typer.Option("--mix", help="also ragged heads of one tier and of all tiers, in as many bytes")
    ] = False,
    mass: Annotated[bool, typer.Option("--mass", help="also with return_mass")] = False,
    error: Annotated[bool, typer.Option("--error", help="relative L2 error against float64")] = False,
    turns: Annotated[int, typer.Option(min=0, max=8, help="turns of the mean key")] = 0,
    window: Annotated[int, typer.Option(min=0, help="tokens of the dense window, as in a decode step")] = 0,
    device: options.Device = "cpu",
    threads: options.Threads = 2,
    seconds: options.Seconds = 1.0,
    huge_pages: options.HugePages = False,
    json: options.JsonOnly = False,
    plot: options.Plot = None,
) -> None:
    """Time one or several tiers. One tier: its fields at the top level of the JSON; several: a list, ``cases``."""
    session = Session.open("decode_attention", device, threads, seconds, huge_pages, json, plot)
    if window >= kv_len or (window and error):
        raise typer.BadParameter(f"{window} must be below kv_len, and 0 with --error", param_hint="--window")
    if turns and error:
        raise typer.BadParameter(f"{turns} must be 0 with --error", param_hint="--turns")
    rivals = session.rivals(attention_rivals(session, batch, heads, kv_heads, q_len, kv_len, head_dim))
    tokens = Tokens.random(batch, kv_heads, kv_len - window, head_dim, session.device)
    q = torch.randn(batch, heads, q_len, head_dim).to(torch.bfloat16)
    keywords: dict[str, Any] = {"window_len": window, "turns": turns} | (
        {} if precision is None else {"precision": precision}
    )
    extras = {"mix": mix, "mass": mass, "error": error}
    measured = [measure(session, width, tokens, q, rivals, extras, keywords) for width in bits]
    cases = [one.fields() for one in measured]
    rows = [row for one in measured for row in one.rows()] + rival_rows(cases[-1])
    context = session.context(
        kv_len=kv_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim, q_len=q_len, batch=batch,
        precision=precision, window=window, turns=turns,
    )  # fmt: skip
    title = f"{heads} q / {kv_heads} kv heads, head_dim {head_dim}, {kv_len} tokens, q_len {q_len}, batch {batch}"
    session.show(title, rows, context | (cases[0] if len(cases) == 1 else {"cases": cases}))


if __name__ == "__main__":
    typer.run(main)
