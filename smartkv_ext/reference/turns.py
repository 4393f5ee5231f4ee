"""What a quantised key has had subtracted: its head's mean key, part of which may turn with the position."""

from __future__ import annotations

import torch

MAX_TURNS = 8
# Sine and cosine of z half turns, |z| <= 1, as polynomials z S(z^2) and C(z^2), off by 6e-6 and 4e-5: that part of a
# mean stays in the codes, and all that matters is that keys and queries take the same.
SIN = (3.14152789, -5.16640186, 2.54271293, -0.58185941, 0.0640261695)
COS = (0.999959767, -4.93276024, 4.04208946, -1.28755546, 0.178306863)


def waves(positions: torch.Tensor, turn_steps: torch.Tensor) -> torch.Tensor:
    """Cosine and sine of the angles of positions (..., n) for turn_steps (..., turns): (..., n, turns, 2) float32."""
    angle = positions.long()[..., None] * turn_steps.long()[..., None, :]  # modulo 2^32, one turn, as int32 is
    z = ((angle + 2**31) % 2**32 - 2**31).double() / 2**31
    sine, cosine = (sum(c * z ** (2 * i) for i, c in enumerate(terms)) for terms in (SIN, COS))
    return torch.stack([torch.as_tensor(cosine), z * sine], -1).float()


def key_shift(
    k_mean: torch.Tensor,
    positions: torch.Tensor,
    k_turns: torch.Tensor | None = None,
    turn_steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """k_mean + sum_i cos(a_i) U_i + sin(a_i) V_i with a_i = 2 pi position step_i / 2^32: see ``waves``.

    k_mean (batch, num_kv_heads, head_dim), positions (batch, num_kv_heads, n) int32, k_turns (batch, num_kv_heads,
    turns, 2, head_dim): U and V, turn_steps (batch, num_kv_heads, turns) int32, the bits of a uint32 -> (batch,
    num_kv_heads, n, head_dim) float32.
    """
    shift = k_mean.float()[:, :, None].expand(-1, -1, positions.shape[2], -1)
    if k_turns is None or turn_steps is None:
        return shift
    return shift + torch.einsum("bhntw,bhtwd->bhnd", waves(positions, turn_steps), k_turns.float())
