"""The ops under FakeTensor, torch.compile and torch.export."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from op_args import MAKE, decode_args
from torch._dynamo.testing import CompileCounterWithBackend

from smartkv_ext import ops

# No op has a gradient; the other parts of opcheck hold for all of them.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", MAKE)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.smartkv, op).default, (), MAKE[op](), test_utils=CHECKS)


@pytest.mark.parametrize("op", ("decode_attention", "attention_mass"))
def test_opcheck_with_options(op: str) -> None:
    args = MAKE[op]()
    args |= {"return_mass": True, "sliding_window": 3} if op == "decode_attention" else {"lse": None}
    torch.library.opcheck(getattr(torch.ops.smartkv, op).default, (), args, test_utils=CHECKS)


def test_compile_decode_attention() -> None:
    """One graph around the op, mutating neighbours included."""

    def step(args: dict[str, Any]) -> torch.Tensor:
        out, lse, _, _ = ops.decode_attention(**{**args, "q": args["q"] * 2})
        return torch.tanh(out) + lse[..., None]

    args = decode_args()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(args), step(args))
    args["q"] = torch.randn(2, 4, 3, 64)
    assert torch.equal(compiled(args), step(args))


def test_compile_decode_step() -> None:
    """One graph serves all steps: what changes is in tensors of the same shapes."""
    counter = CompileCounterWithBackend("aot_eager")
    args = decode_args()
    positions = torch.arange(200, 207).int().repeat(2, 1)

    def step(q: torch.Tensor, q_start: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        for window in (args["k_window"], args["v_window"]):
            window.index_copy_(2, slot, q[:, ::2])
        step_args = {**args, "q": q, "window_positions": positions, "q_start": q_start}
        return torch.tanh(ops.decode_attention(**step_args)[0])

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    outs = []
    for i in range(7):
        now = (torch.randn(2, 4, 1, 64), torch.tensor([200 + i]), torch.tensor([i]))
        outs.append(compiled(*now))
        assert torch.equal(outs[-1], step(*now))
    assert counter.frame_count == 1


def test_an_int_is_a_position() -> None:
    args = decode_args()
    expected = ops.decode_attention(**args)
    for ours, want in zip(ops.decode_attention(**{**args, "q_start": 200}), expected, strict=True):
        assert torch.equal(ours, want)


def test_compile_decode_attention_over_a_growing_window() -> None:
    """Two graphs serve all lengths of the window."""
    counter = CompileCounterWithBackend("aot_eager")
    args = decode_args()
    rest = {name: args[name] for name in args if "window" not in name}

    def step(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.tanh(ops.decode_attention(**rest, k_window=k, v_window=v, window_positions=positions)[0])

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for used in (31, 32, 33, 40):  # unlike every other size, which a graph would take for the same
        kv = torch.randn(2, *args["k_window"].shape[:2], used, 64)
        now = (*kv, torch.arange(used).int().repeat(2, 1))
        assert torch.equal(compiled(*now), step(*now))
    assert counter.frame_count <= 2


def test_compile_append() -> None:
    """torch.compile knows from the schema that append_kv mutates the pools and the lengths."""

    def step(args: dict[str, Any]) -> torch.Tensor:
        before = args["cache_seqlens"].sum()
        ops.append_kv(**args)
        return args["cache_seqlens"].sum() - before

    expected, args = MAKE["append_kv"](), MAKE["append_kv"]()
    args |= {name: value for name, value in expected.items() if name in ("k", "v", "k_mean", "scores")}
    assert step(expected) == 2 * 2 * 5
    assert torch.compile(step, backend="aot_eager", fullgraph=True)(args) == 2 * 2 * 5
    assert all(torch.equal(a, b) for a, b in zip(args["pools"], expected["pools"], strict=True))


def test_export_merge_states() -> None:
    class Merge(torch.nn.Module):
        def forward(self, o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return ops.merge_states(o, lse)

    o, lse = torch.randn(3, 5, 64), torch.randn(3, 5)
    program = torch.export.export(Merge(), (o, lse))
    assert torch.equal(program.module()(o, lse)[0], ops.merge_states(o, lse)[0])


@pytest.mark.parametrize("op", MAKE)
def test_wrapper_has_the_schema_of_the_op(op: str) -> None:
    """Same argument names in the same order in Python and in the schema."""
    schema = getattr(torch.ops.smartkv, op).default._schema
    assert [x.name for x in schema.arguments] == list(inspect.signature(getattr(ops, op)).parameters)
