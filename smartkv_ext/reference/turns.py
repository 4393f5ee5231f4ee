"""What a quantised key has had subtracted: its head's mean key, part of which may turn with the position."""

from __future__ import annotations

import math

import torch

MAX_TURNS = 8


def key_shift(
    k_mean: torch.Tensor,
    positions: torch.Tensor,
    k_turns: torch.Tensor | None = None,
    turn_steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """k_mean + sum_i cos(a_i) U_i + sin(a_i) V_i with a_i = 2 pi position step_i / 2^32, modulo a turn.

    k_mean (batch, num_kv_heads, head_dim), positions (batch, num_kv_heads, n) int32, k_turns (batch, num_kv_heads,
    turns, 2, head_dim): U and V, turn_steps (batch, num_kv_heads, turns) int32, the bits of a uint32 -> (batch,
    num_kv_heads, n, head_dim) float32.
    """
    shift = k_mean.float()[:, :, None].expand(-1, -1, positions.shape[2], -1)
    if k_turns is None or turn_steps is None:
        return shift
    phase = positions.long()[..., None] * turn_steps.long()[:, :, None] % 2**32  # int64 wraps: the low bits are exact
    angle = phase.double() * (2 * math.pi / 2**32)
    waves = torch.stack([angle.cos(), angle.sin()], -1).float()  # (batch, num_kv_heads, n, turns, 2)
    return shift + torch.einsum("bhntw,bhtwd->bhnd", waves, k_turns.float())
