"""Mean keys, measured when a layer packs for the first time: what quantised keys lose, and what of it turns.

Before RoPE keys have a mean m, in Qwen2.5 a hundred times what a token adds to it. RoPE turns it with the position p, a
pair of channels by the angle p w. Where a pair turns within the context, a constant mean key takes little of it away;
of the pairs where most would be left, the cache subtracts m turned to each key's position instead: in the basis of the
keys two vectors U and V per pair, cos(p w) U + sin(p w) V.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from smartkv_ext.reference.turns import MAX_TURNS, waves

if TYPE_CHECKING:
    from .layer import SmartKVLayer

FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length
# What is seen is not all that will come: a pair counts by what a constant would leave of it in a context of this many
# tokens, or twice those seen.
LEAST_HORIZON = 4096
# A turn must take away this share of what no mean takes away. It costs 4 bytes per channel: as many as the bits that
# the share is worth are in a thousand tokens.
LEAST_GAIN = 0.05
MAX_SAMPLE = 4096  # tokens that m is measured on
LARGEST_HALF = 65504.0


class Means(NamedTuple):
    """k_mean (batch, num_kv_heads, head_dim) float32; turns, steps as ops take them, None where nothing turns."""

    k_mean: torch.Tensor
    k_turns: torch.Tensor | None = None
    turn_steps: torch.Tensor | None = None


def fixed_frequencies(config: Any, inv_freq: tuple[float, ...], head_dim: int) -> tuple[float, ...]:
    """``inv_freq`` where it holds for all lengths and all channels; else nothing, and means are constant."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    holds = parameters.get("rope_type") in FIXED_ROPE and 2 * len(inv_freq) == head_dim
    return inv_freq if holds and parameters.get("partial_rotary_factor", 1.0) == 1.0 else ()


def measure_means(layer: SmartKVLayer) -> Means:
    """Of all keys in the window; fixed from the first packing on."""
    valid = layer.window.held_positions() >= 0
    keys = layer.window.held("k")
    count = valid.sum(1).clamp(min=1)[:, None, None]
    mean = torch.where(valid[:, None, :, None], keys.float(), 0.0).sum(2) / count
    if not layer.config.turn_freq:
        return Means(mean)
    found = _choose_turns(layer, mean)
    if found is None:
        return Means(mean)
    turns, steps = found
    held = layer.window.held_positions()[:, None].expand(-1, keys.shape[1], -1)
    seen = torch.where(valid[:, None, :, None, None], waves(held, steps), 0.0).sum(2) / count[..., None]
    return Means(mean - torch.einsum("bhtw,bhtwd->bhd", seen, turns.float()), turns, steps)


def _choose_turns(layer: SmartKVLayer, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """U and V (batch, num_kv_heads, turns, 2, head_dim) float16 and steps (batch, num_kv_heads, turns) int32 of the
    pairs that are worth it, zeros for a head with fewer than the others of the layer."""
    step = -(-layer.window.used // MAX_SAMPLE)
    positions, keys = layer.window.held_positions()[:, ::step], layer.window.held("k")[:, :, ::step]
    valid = (positions >= 0)[:, None, :, None]
    count = valid.sum(2).clamp(min=1)
    frequency = torch.tensor(layer.config.turn_freq, dtype=torch.float64, device=keys.device)
    # Mean before RoPE, as complex numbers: channels j and j + head_dim / 2 are a pair.
    angle = positions.double()[..., None] * frequency
    first, second = torch.where(valid, layer.basis.model_keys(keys).float(), 0.0).chunk(2, -1)
    back = torch.polar(torch.ones_like(angle), -angle)[:, None].to(torch.complex64)
    before = (torch.complex(first, second) * back).sum(2) / count  # (batch, num_kv_heads, head_dim / 2)
    spread = torch.where(valid, keys.float().square(), 0.0).sum((2, 3)) / count[..., 0] - mean.square().sum(-1)

    unit = torch.eye(keys.shape[-1], device=keys.device).expand(1, keys.shape[1], -1, -1)
    one, other = layer.basis.differences(unit).chunk(2, 2)  # (1, num_kv_heads, head_dim / 2, head_dim)
    a, b = before.real[..., None], before.imag[..., None]
    vectors = torch.stack([a * one + b * other, a * other - b * one], 3)
    power = vectors.square().sum((3, 4)) / 2
    gain = power * _left(frequency, max(2 * layer.seen, LEAST_HORIZON))
    own = spread - (power * _left(frequency, layer.seen)).sum(-1)
    gain, pairs = gain.topk(min(MAX_TURNS, gain.shape[-1]), -1)
    floor = LEAST_GAIN * own.clamp(min=1e-3 * spread).clamp(min=1e-30)
    vectors = vectors.gather(2, pairs[..., None, None].expand(-1, -1, -1, *vectors.shape[3:]))
    worth = (gain > floor[..., None]) & (vectors.abs().amax((3, 4)) < LARGEST_HALF)  # False for NaN
    most = int(worth.sum(-1).max())
    if most == 0:
        return None
    first_of = (~worth).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
    worth, pairs = worth.gather(-1, first_of), pairs.gather(-1, first_of)
    vectors = vectors.gather(2, first_of[..., None, None].expand(-1, -1, -1, *vectors.shape[3:]))
    steps = (frequency * (2**32 / (2 * math.pi))).round().long().remainder(2**32)
    steps = torch.where(worth, steps[pairs], 0)
    steps = torch.where(steps >= 2**31, steps - 2**32, steps).to(torch.int32)
    return torch.where(worth[..., None, None], vectors, 0.0).half().contiguous(), steps.contiguous()


def _left(frequency: torch.Tensor, tokens: int) -> torch.Tensor:
    """Share of a turning mean's power that its own mean over ``tokens`` positions leaves: 1 - |mean of e^ipw|^2."""
    half = frequency / 2
    coherence = (half * tokens).sin() / (tokens * half.sin())
    return (1 - coherence.square()).float()
