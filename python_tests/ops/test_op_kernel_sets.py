"""All kernel sets and thread counts give the same pages and, within float32 rounding, the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_args import MAKE
from op_inputs import DTYPES, HEAD_DIMS, give_pages, paged, strided, tokens
from test_op_pages import compact, random_targets

from smartkv_ext import ops
from smartkv_ext.reference.layout import TIERS

HERE = Path(__file__).parent


def run_all() -> dict[str, Any]:
    """Results of every op on inputs that depend on the seed alone."""
    torch.manual_seed(0)
    out: dict[str, Any] = {"name": ops.kernel_set_name()}
    for head_dim, dtype in zip(HEAD_DIMS, (*DTYPES, *DTYPES), strict=False):
        turns = head_dim // 16 % 9  # 4, 5, 6, 8, 7
        cache = paged(TIERS, head_dim, dtype, "gaussian" if head_dim % 32 == 0 else "uniform", turns=turns)
        give_pages(cache)
        new = tokens(2, 2, 21, head_dim, dtype) | {"k_mean": cache.k_mean}
        tiers = torch.randint(-1, len(TIERS), (2, 2, 21)).to(torch.int8)
        ops.append_kv(
            cache.pools, cache.block_table, cache.cache_seqlens, **new,
            tiers=tiers, tier_bits=cache.tier_bits, levels=cache.levels, **cache.turns,
        )  # fmt: skip
        out[f"bytes append {head_dim}"] = torch.cat([p.flatten() for p in cache.pools])
        q, k, v = (strided(2, h, n, head_dim, dtype=dtype) for h, n in ((6, 3), (2, 19), (2, 19)))
        for precision in ("fp32", "int8"):
            out[f"decode {head_dim} {precision} {dtype}"] = ops.decode_attention(
                q, cache.pools, cache.block_table, cache.cache_seqlens, cache.k_mean, k, v,
                torch.arange(19).int().repeat(2, 1), 500, cache.tier_bits, cache.levels, return_mass=True,
                precision=precision, **cache.turns,
            )  # fmt: skip
        compact(ops, cache, random_targets(cache))
        out[f"bytes compact {head_dim}"] = torch.cat([p.flatten() for p in cache.pools])
    for op in ("dequantize_kv", "attention_mass", "merge_states", "gate_score", "select_kv", "change_basis"):
        result = getattr(ops, op)(**MAKE[op]())
        out[op] = (result,) if isinstance(result, torch.Tensor) else result
    return out


def assert_same_results(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bytes may differ in one of 10,000, where a code sits on a midpoint; numbers by float32 rounding, or by the
    rounding to eight bits that kernel sets do in their own ways."""
    for name, want in expected.items():
        if name.startswith("bytes"):
            assert float((ours[name] != want).float().mean()) < 1e-4, name
        elif name != "name":
            rtol, atol = (2e-2, 1e-3) if "16" in name.split()[-1] else (1e-5, 1e-5)
            if "int8" in name:
                rtol, atol = 5e-2, 5e-2
            for a, b in zip(ours[name], want, strict=True):
                assert torch.allclose(a.float(), b.float(), rtol=rtol, atol=atol), name


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_subprocess("portable", tmp_path_factory.mktemp("portable"))


def in_subprocess(name: str, folder: Path) -> dict[str, Any]:
    path = folder / "results.pt"
    code = f"import torch, test_op_kernel_sets as t; torch.save(t.run_all(), {str(path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, env={**os.environ, "SMARTKV_ISA": name}, check=True)
    results: dict[str, Any] = torch.load(path, weights_only=True)
    assert results["name"] == name
    return results


@pytest.mark.parametrize("name", ("avx2", "avx512"))
def test_kernel_set_equals_portable(name: str, portable: dict[str, Any], tmp_path: Path) -> None:
    if name not in ops.available_kernel_sets():
        pytest.skip(f"this CPU cannot run the kernel set {name}")
    assert_same_results(in_subprocess(name, tmp_path), portable)


def test_unknown_kernel_set() -> None:
    code = "from smartkv_ext import ops; ops.kernel_set_name()"
    env = {**os.environ, "SMARTKV_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "SMARTKV_ISA=sse9" in done.stderr and "portable" in done.stderr


def test_thread_counts_agree() -> None:
    torch.set_num_threads(1)
    expected = run_all()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        results = run_all()
        assert_same_results(results, expected)
        for name, want in expected.items():
            if name.startswith("bytes"):
                assert torch.equal(results[name], want), f"{name} depends on the number of threads"
