"""pytest-benchmark variants, to compare two commits on one machine:

python -m pytest bench/test_bench.py --benchmark-autosave
python -m pytest bench/test_bench.py --benchmark-compare
"""

import itertools

import pytest
import torch

from bench.decode_attention import packed_calls
from smartkv_ext import ops
from smartkv_ext.reference.layout import page_layout
from smartkv_ext.reference.levels import RELATIVE_DISTORTION

KV_HEADS, KV_LEN, HEAD_DIM = 8, 8192, 128
TIERS = (2, 3, 4, 8, 16)


@pytest.mark.parametrize("bits", TIERS)
def test_decode_attention(benchmark, bits):
    calls, num_bytes = packed_calls(bits, KV_LEN, 4 * KV_HEADS, KV_HEADS, HEAD_DIM)
    turn = itertools.cycle(calls)  # another copy each time, so that every read is cold
    benchmark.extra_info["bytes"] = num_bytes
    benchmark(lambda: next(turn)())


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_quantize_kv(benchmark, bits):
    k, v = torch.randn(2, 1, KV_HEADS, KV_LEN, HEAD_DIM).to(torch.bfloat16)
    positions = torch.arange(KV_LEN, dtype=torch.int32).expand(1, KV_HEADS, -1).contiguous()
    scores = torch.rand(1, KV_HEADS, KV_LEN)
    benchmark(ops.quantize_kv, k, v, k.float().mean(2), positions, scores, bits)


def test_select_kv(benchmark):
    scores = torch.rand(KV_HEADS, 1, KV_LEN)
    current = torch.full((KV_HEADS, 1, KV_LEN), len(TIERS), dtype=torch.int8)
    page_bytes = [page_layout(bits, HEAD_DIM).page_bytes for bits in TIERS]
    budgets = torch.full((KV_HEADS,), KV_LEN * HEAD_DIM * 4 // 8, dtype=torch.int64)
    benchmark(ops.select_kv, scores, current, budgets, page_bytes, [RELATIVE_DISTORTION[bits] for bits in TIERS])
