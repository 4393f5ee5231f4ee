"""What attention, selection and gate refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_args import INT32_MAX, at, check_refusal, name_of, of

R = RuntimeError

# (op, argument, its bad value or a function that makes it from the good arguments, error, message)
CASES = [
    ("decode_attention", "levels", "x", R, "levels must be one of uniform, gaussian; got 'x'"),
    (
        "decode_attention",
        "q",
        torch.zeros(2, 4, 1, 64).double(),
        R,
        "q must be float32, bfloat16 or float16; got float64",
    ),
    ("decode_attention", "q", torch.zeros(2, 3, 1, 64), R, "num_heads of q (3) must be a multiple of num_kv_heads (2)"),
    (
        "decode_attention",
        "q",
        torch.zeros(1, 4, 1, 64),
        R,
        "q must have shape (batch, num_heads, q_len, head_dim) = (2, 4, 1, 64); got (1, 4, 1, 64)",
    ),
    ("decode_attention", "q", torch.zeros(2, 4, 0, 64), R, "q_len must be in [1, 2147483647]; got 0"),
    ("decode_attention", "q", torch.zeros(2, 0, 1, 64), R, "num_heads must be in [1, 2147483647]; got 0"),
    (
        "decode_attention",
        "q",
        torch.zeros(2, 4, 64),
        R,
        "q must have 4 dimensions (batch, heads, n, head_dim); got shape (2, 4, 64)",
    ),
    (
        "decode_attention",
        "q",
        torch.zeros(2, 4, 64, 2).transpose(2, 3),
        R,
        "q must be contiguous in its last dimension; got stride 2",
    ),
    ("decode_attention", "q", torch.zeros(2, 4, 1, 64).half(), R, "pools[2] must have pages of"),
    ("decode_attention", "k_window", torch.zeros(2, 2, 7, 64).half(), R, "k_window must be float32; got float16"),
    (
        "decode_attention",
        "k_window",
        torch.zeros(2, 1, 7, 64),
        R,
        "k_window must have shape (batch, num_kv_heads, window_len, head_dim) = (2, 2, 7, 64); got (2, 1, 7, 64)",
    ),
    (
        "decode_attention",
        "v_window",
        torch.zeros(2, 2, 6, 64),
        R,
        "v_window must have shape (batch, num_kv_heads, window_len, head_dim) = (2, 2, 7, 64); got (2, 2, 6, 64)",
    ),
    (
        "decode_attention",
        "window_positions",
        torch.zeros(2, 6).int(),
        R,
        "window_positions must have shape (batch, window_len) = (2, 7); got (2, 6)",
    ),
    ("decode_attention", "window_positions", torch.zeros(2, 7), R, "window_positions must be int32; got float32"),
    ("decode_attention", "q_start", -1, R, "q_start must be in [0, 2147483647]; got -1"),
    ("decode_attention", "q_start", INT32_MAX, R, "q_start + q_len must be in [1, 2147483647]; got 2147483648"),
    ("decode_attention", "softmax_scale", float("nan"), R, "softmax_scale must be finite; got nan"),
    ("decode_attention", "sliding_window", -1, R, "sliding_window must be at least 0 (0: none); got -1"),
    ("decode_attention", "tier_bits", [4, 2, 16], R, "tier_bits must be ascending; got 2 after 4"),
    (
        "decode_attention",
        "block_table",
        of("block_table", lambda x: x * 0 + 2147480000),
        R,
        "a page of the tier's pool; got 2147480000",
    ),
    ("decode_attention", "block_table", torch.zeros(0, 2, 3, 3).int(), R, "batch must be in [1, 2147483647]; got 0"),
    (
        "decode_attention",
        "cache_seqlens",
        at("cache_seqlens", (0, 0, 0), INT32_MAX),
        R,
        "cache_seqlens[0, 0, 0] must be in [0, 192], 64 per page of block_table; got 2147483647",
    ),
    ("decode_attention", "q", "text", R, "q"),
    ("attention_mass", "q", torch.zeros(2, 3, 3, 64), R, "num_heads of q (3) must be a multiple of num_kv_heads (2)"),
    ("attention_mass", "q", torch.zeros(2, 4, 0, 64), R, "q_len must be in [1, 2147483647]; got 0"),
    ("attention_mass", "q", torch.zeros(2, 4, 3, 64).int(), R, "q must be float32, bfloat16 or float16; got int32"),
    (
        "attention_mass",
        "k",
        torch.zeros(2, 2, 9, 80),
        R,
        "k must have shape (batch, num_kv_heads, kv_len, head_dim) = (2, 2, 9, 64); got (2, 2, 9, 80)",
    ),
    ("attention_mass", "k", torch.zeros(2, 0, 9, 64), R, "num_kv_heads must be in [1, 2147483647]; got 0"),
    (
        "attention_mass",
        "k_positions",
        torch.zeros(2, 8).int(),
        R,
        "k_positions must have shape (batch, kv_len) = (2, 9); got (2, 8)",
    ),
    (
        "attention_mass",
        "lse",
        torch.zeros(2, 4),
        R,
        "lse must have shape (batch, num_heads, q_len) = (2, 4, 3); got (2, 4)",
    ),
    ("attention_mass", "q_start", -3, R, "q_start must be in [0, 2147483647]; got -3"),
    ("attention_mass", "softmax_scale", float("inf"), R, "softmax_scale must be finite; got inf"),
    ("attention_mass", "sliding_window", -2, R, "sliding_window must be at least 0 (0: none); got -2"),
    ("merge_states", "o", torch.zeros(3, 5, 65), R, "head_dim must be one of 64, 80, 96, 128, 256; got 65"),
    ("merge_states", "o", torch.zeros(3), R, "o must have shape (num_states, ..., head_dim); got 1 dimension(s)"),
    ("merge_states", "o", torch.zeros(3, 5, 64).long(), R, "o must be float32, bfloat16 or float16; got int64"),
    ("merge_states", "lse", torch.zeros(3, 4), R, "lse must have the shape of o without its last dimension"),
    ("merge_states", "lse", torch.zeros(3, 5).half(), R, "lse must be float32; got float16"),
    ("select_kv", "scores", torch.zeros(2, 9), R, "scores must have 3 dimensions (groups, heads, n); got shape (2, 9)"),
    ("select_kv", "scores", torch.zeros(2, 3, 9).half(), R, "scores must be float32; got float16"),
    ("select_kv", "current", torch.zeros(2, 3, 9).int(), R, "current must be int8; got int32"),
    (
        "select_kv",
        "current",
        at("current", (1, 2, 8), 3),
        R,
        "current must be in [-1, 2] (-1: no token, 2: full precision); got 3",
    ),
    (
        "select_kv",
        "current",
        at("current", (1, 2, 8), -2),
        R,
        "current must be in [-1, 2] (-1: no token, 2: full precision); got -2",
    ),
    ("select_kv", "budgets", torch.tensor([5]), R, "budgets must have shape (groups) = (2,); got (1,)"),
    ("select_kv", "budgets", torch.tensor([5, -1]), R, "budgets must be at least 0; got -1"),
    ("select_kv", "budgets", torch.tensor([5, 5]).int(), R, "budgets must be int64; got int32"),
    ("select_kv", "page_bytes", [], R, "page_bytes must have 1 to 5 entries; got 0"),
    ("select_kv", "page_bytes", [1000, 1000], R, "page_bytes must be positive and ascending; got 1000 at index 1"),
    ("select_kv", "page_bytes", [0, 1000], R, "page_bytes must be positive and ascending; got 0 at index 0"),
    ("select_kv", "distortion", [0.1], R, "distortion must have one entry per page_bytes (2); got 1"),
    ("select_kv", "distortion", [0.1, float("nan")], R, "distortion must be finite; got nan"),
    ("select_kv", "evict_distortion", float("inf"), R, "evict_distortion must be finite; got inf"),
    ("select_kv", "zipf_offset", 0.0, R, "zipf_offset must be finite and above 0; got 0"),
    ("gate_score", "keys", [], R, "keys must have at least one tensor; got 0"),
    (
        "gate_score",
        "keys",
        at("keys", 1, torch.zeros(2, 3, 8, 64)),
        R,
        "keys[1] must have shape of keys[0] = (2, 3, 9, 64); got (2, 3, 8, 64)",
    ),
    ("gate_score", "keys", at("keys", 1, torch.zeros(2, 3, 9, 64).half()), R, "keys[1] must be float32; got float16"),
    ("gate_score", "weights", of("weights", lambda x: x[:1]), R, "weights must have 2 or 3 tensors; got 1"),
    (
        "gate_score",
        "weights",
        at("weights", 0, torch.zeros(2, 3, 16, 63)),
        R,
        "weights[0] must have shape (num_layers, num_kv_heads, out, in) = (2, 3, 16, 64); got (2, 3, 16, 63)",
    ),
    (
        "gate_score",
        "weights",
        at("weights", 1, torch.zeros(2, 3, 2, 16)),
        R,
        "weights[1] must have shape (num_layers, num_kv_heads, out, in) = (2, 3, 1, 16); got (2, 3, 2, 16)",
    ),
    (
        "gate_score",
        "weights",
        at("weights", 1, torch.zeros(2, 3, 16)),
        R,
        "weights[1] must have 4 dimensions (num_layers, num_kv_heads, out, in); got shape (2, 3, 16)",
    ),
    (
        "gate_score",
        "weights",
        at("weights", 0, torch.zeros(2, 3, 0, 64)),
        R,
        "out of weights must be in [1, 2147483647]; got 0",
    ),
    ("gate_score", "biases", of("biases", lambda x: x[:1]), R, "biases must have one tensor per weight (2); got 1"),
    (
        "gate_score",
        "biases",
        at("biases", 0, torch.zeros(2, 3, 15)),
        R,
        "biases[0] must have shape (num_layers, num_kv_heads, out) = (2, 3, 16); got (2, 3, 15)",
    ),
]


@pytest.mark.parametrize(("op", "argument", "bad", "error", "message"), CASES, ids=name_of)
def test_refusal(op: str, argument: str, bad: Any, error: type[Exception], message: str) -> None:
    check_refusal(op, argument, bad, error, message)
