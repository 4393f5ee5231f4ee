"""pytest-benchmark variants, to compare two commits on one machine:

python -m pytest bench/test_bench.py --benchmark-autosave
python -m pytest bench/test_bench.py --benchmark-compare
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bench.append_kv import append_calls, cache_with_room
from bench.attention_mass import mass_calls
from bench.change_basis import basis_calls
from bench.compact_kv import compact_calls, random_targets
from bench.decode_attention import attention_calls
from bench.dequantize_kv import dequantize_calls
from bench.gate_score import gate_calls, random_gate
from bench.merge_states import merge_calls
from bench.operands import Tokens, mixed_cache, uniform_cache
from bench.quantize_kv import quantize_calls
from bench.select_kv import select_calls
from bench.session import Session
from bench.timing import Work
from smartkv_ext.reference.layout import TIERS

HEADS, KV_HEADS, KV_LEN, HEAD_DIM = 32, 8, 8192, 128


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.open("decode_attention", "cpu", 2, 0.1, False, True, None)


@pytest.fixture
def run(benchmark: Any) -> Any:
    """Time a Work: another copy each round, so that every read is cold, and restored outside the timing."""

    def go(work: Work, rounds: int = 100) -> None:
        turns, last = itertools.cycle(range(len(work.calls))), []

        def setup() -> tuple[tuple[Any], dict[str, Any]]:
            if last and work.restore:
                work.restore(last.pop())
            last[:] = [next(turns)]
            return (work.calls[last[0]],), {}

        benchmark.extra_info["bytes"] = work.num_bytes
        benchmark.pedantic(lambda call: call(), setup=setup, rounds=rounds, warmup_rounds=2)

    return go


def random_query(q_len: int = 1) -> torch.Tensor:
    return torch.randn(1, HEADS, q_len, HEAD_DIM).to(torch.bfloat16)


@pytest.mark.parametrize("bits", TIERS)
def test_decode_attention(run: Any, session: Session, bits: int) -> None:
    cache = uniform_cache(Tokens.random(1, KV_HEADS, KV_LEN, HEAD_DIM), bits)
    run(attention_calls(session, cache, random_query()))


def test_decode_attention_of_four_queries(run: Any, session: Session) -> None:
    cache = uniform_cache(Tokens.random(1, KV_HEADS, KV_LEN, HEAD_DIM), 4)
    run(attention_calls(session, cache, random_query(q_len=4)))


def test_decode_attention_with_mass(run: Any, session: Session) -> None:
    cache = uniform_cache(Tokens.random(1, KV_HEADS, KV_LEN, HEAD_DIM), 4)
    run(attention_calls(session, cache, random_query(), return_mass=True))


def test_decode_attention_mixed(run: Any, session: Session) -> None:
    uniform = uniform_cache(Tokens.random(1, KV_HEADS, KV_LEN, HEAD_DIM), 4)
    run(attention_calls(session, mixed_cache(uniform.num_bytes, 1, KV_HEADS, HEAD_DIM), random_query()))


@pytest.mark.parametrize("bits", TIERS)
def test_quantize_kv(run: Any, session: Session, bits: int) -> None:
    run(quantize_calls(session, Tokens.random(1, KV_HEADS, KV_LEN, HEAD_DIM), bits), rounds=20)


@pytest.mark.parametrize("bits", TIERS)
def test_dequantize_kv(run: Any, session: Session, bits: int) -> None:
    run(dequantize_calls(session, Tokens.random(1, KV_HEADS, KV_LEN, HEAD_DIM), bits), rounds=20)


@pytest.mark.parametrize("new", (64, KV_LEN))
def test_append_kv(run: Any, session: Session, new: int) -> None:
    cache = cache_with_room(KV_LEN, new, 1, KV_HEADS, HEAD_DIM, bits=4)
    run(append_calls(session, cache, Tokens.random(1, KV_HEADS, new, HEAD_DIM)), rounds=20)


@pytest.mark.parametrize("bits", TIERS)
def test_compact_kv(run: Any, session: Session, bits: int) -> None:
    cache = uniform_cache(Tokens.random(1, KV_HEADS, KV_LEN, HEAD_DIM), bits)
    run(compact_calls(session, cache, random_targets(cache, 0.5)))


def test_attention_mass(run: Any, session: Session) -> None:
    k = torch.randn(1, KV_HEADS, KV_LEN, HEAD_DIM).to(torch.bfloat16)
    run(mass_calls(session, random_query(q_len=32), k), rounds=20)


def test_gate_score(run: Any, session: Session) -> None:
    keys = torch.randn(1, 1, KV_HEADS, KV_LEN, HEAD_DIM).to(torch.bfloat16)
    run(gate_calls(session, keys, *random_gate(1, KV_HEADS, (HEAD_DIM, 256, 256, 1))), rounds=20)


def test_select_kv(run: Any, session: Session) -> None:
    run(select_calls(session, torch.rand(1, KV_HEADS, KV_LEN), HEAD_DIM, budget=0.125))


def test_change_basis(run: Any, session: Session) -> None:
    matrix, shift = torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM), torch.randn(KV_HEADS, HEAD_DIM)
    run(basis_calls(session, torch.randn(1, HEADS, 1, HEAD_DIM).to(torch.bfloat16), matrix, shift))


def test_merge_states(run: Any, session: Session) -> None:
    run(merge_calls(session, torch.randn(8, 1, HEADS, HEAD_DIM).to(torch.bfloat16), torch.randn(8, 1, HEADS)))
