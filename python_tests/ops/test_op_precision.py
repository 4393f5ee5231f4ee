"""decode_attention with rounded queries and probabilities: how far from float64, and what must survive rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_inputs import Paged, paged, tokens

from smartkv_ext import ops
from smartkv_ext.reference.layout import TIERS, page_layout

HERE = Path(__file__).parent
KV_LEN, GROUPS = 1000, 4
# Shapes whose planes fill whole registers, and others, see csrc/cpu/dot.h.
CASES = [(bits, head_dim) for bits in TIERS[:-1] for head_dim in (64, 80, 128, 256)]


def run(cache: Paged, q: torch.Tensor, precision: str) -> tuple[torch.Tensor, ...]:
    """Attention over the pages alone."""
    return ops.decode_attention(
        q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, None, None, None,
        KV_LEN, cache.tier_bits, cache.levels, return_mass=True,
        precision=precision,
    )  # fmt: skip


def diffuse(bits: int, head_dim: int, q_len: int = 1) -> tuple[Paged, torch.Tensor]:
    """Random keys and queries: scores of order 1, so that many tokens share the attention."""
    cache = paged((bits,), head_dim, batch=1, heads=1, sizes=(KV_LEN,))
    return cache, torch.randn(1, GROUPS, q_len, head_dim)


def dense(cache: Paged, q: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, mass) over the dequantised cache, computed in dtype."""
    k, v, _ = cache.dense(0, 0)
    k, v = k.to(dtype), v.to(dtype)
    probs = torch.softmax(q[0].to(dtype) @ k.T * q.shape[-1] ** -0.5, -1)
    return probs @ v, probs.sum((0, 1))


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double().flatten() - exact.flatten()).norm() / exact.norm())


@pytest.mark.parametrize("q_len", (1, 2, 5))
@pytest.mark.parametrize(("bits", "head_dim"), CASES)
def test_error_of_each_precision(bits: int, head_dim: int, q_len: int) -> None:
    cache, q = diffuse(bits, head_dim, q_len)
    exact, exact_mass = dense(cache, q, torch.float64)
    eager, eager_mass = dense(cache, q, torch.bfloat16)
    allowed = {"fp32": 1e-5, "int16": relative_error(eager, exact), "int8": 2e-2}
    allowed["auto"] = allowed["int16" if bits == 8 else "int8"]
    for precision, bound in allowed.items():
        out, _, mass, _ = run(cache, q, precision)
        assert relative_error(out, exact) <= bound, precision
        mass = mass[0, 0, 0, :KV_LEN]
        assert relative_error(mass, exact_mass) <= max(bound, relative_error(eager_mass, exact_mass)), precision


def test_int16_beats_int8() -> None:
    """Else a kernel set would have dropped a digit."""
    cache, q = diffuse(4, 128)
    exact, _ = dense(cache, q, torch.float64)
    error = {p: relative_error(run(cache, q, p)[0], exact) for p in ("int16", "int8")}
    assert error["int16"] < error["int8"] / 20


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("precision", ("fp32", "int16", "int8", "auto"))
def test_a_query_that_is_not_finite_is_not_hidden(precision: str, bad: float) -> None:
    cache, q = diffuse(4, 64)
    q[0, 1, 0, 3] = bad
    out, lse, _, _ = run(cache, q, precision)
    spoiled = torch.tensor([False, True, False, False])
    assert torch.equal(out[0, :, 0].isnan().any(-1), spoiled) and torch.equal(lse[0, :, 0].isnan(), spoiled)


@pytest.mark.parametrize("precision", ("int16", "int8"))
def test_zero_and_tiny_queries_attend_evenly(precision: str) -> None:
    cache, q = diffuse(4, 128)
    for scale in (0.0, 1e-38):
        out, lse, mass, _ = run(cache, q * scale, precision)
        _, v, _ = cache.dense(0, 0)
        assert torch.allclose(out[0, :, 0], v.mean(0).expand(GROUPS, -1), atol=3e-3)
        assert torch.allclose(lse, torch.tensor(float(KV_LEN)).log(), atol=1e-4)
        assert torch.allclose(mass[0, 0, 0, :KV_LEN], torch.tensor(GROUPS / KV_LEN), rtol=2e-3)


@pytest.mark.parametrize("precision", ("int16", "int8"))
def test_sharp_attention(precision: str) -> None:
    """One key takes everything: its value comes back, whatever the other weights round to."""
    cache, _ = diffuse(8, 64)
    k, v, _ = cache.dense(0, 0)
    k = k - k.mean(0)  # what all keys share moves all scores alike
    token = int(k.norm(dim=-1).argmax())
    q = (k[token] * 40).float().expand(1, GROUPS, 1, 64).contiguous()
    out, _, mass, _ = run(cache, q, precision)
    assert torch.allclose(out[0, 0, 0], v[token].float(), atol=2e-2)
    assert float(mass[0, 0, 0, token]) == pytest.approx(GROUPS, rel=1e-2)


@pytest.mark.parametrize("precision", ("fp32", "int16", "int8", "auto"))
@pytest.mark.parametrize("kind", ("k", "v"))
@pytest.mark.parametrize("bits", TIERS)
def test_nan_reaches_the_output(bits: int, kind: str, precision: str) -> None:
    """Integers cannot hold it, and a scale that is no number must not count as zero."""
    args = tokens(1, 1, KV_LEN, 64)
    args[kind][0, 0, 77, 3] = torch.nan
    pages = ops.quantize_kv(**args, bits=bits)[0, 0]
    table = torch.arange(len(pages), dtype=torch.int32).view(1, 1, 1, -1)
    length = torch.full((1, 1, 1), KV_LEN, dtype=torch.int32)
    cache = Paged(
        [pages], table, length, args["k_mean"], (bits,), "gaussian", torch.float32, [page_layout(bits, 64, 4)]
    )
    out = run(cache, torch.randn(1, GROUPS, 1, 64), precision)[0]
    if kind == "v" and bits == 16:  # plain values: only the channel
        assert out.isnan().sum() == GROUPS
    else:
        assert out.isnan().all()


@pytest.mark.parametrize("name", ("avx2", "portable"))
def test_other_kernel_sets(name: str) -> None:
    """The same bounds hold in every kernel set, which is chosen once per process."""
    if name not in ops.available_kernel_sets():
        pytest.skip(f"this CPU cannot run the kernel set {name}")
    if os.environ.get("SMARTKV_ISA"):
        pytest.skip("this process is the one that a kernel set was chosen for")
    tests = [
        f"{Path(__file__).name}::test_{x}"
        for x in ("error_of_each_precision", "sharp_attention", "nan_reaches_the_output")
    ]
    env = {**os.environ, "SMARTKV_ISA": name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=HERE, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
