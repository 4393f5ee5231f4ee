"""What quantised keys lose and are multiplied by, measured when a layer packs for the first time.

Before RoPE keys have a mean m, in Qwen2.5 a hundred times what a token adds to it. RoPE turns it with the position p, a
pair of channels by the angle p w. Where a pair turns within the context, a constant mean key takes little of it away;
of the pairs where most would be left, the cache subtracts m turned to each key's position instead: in the basis of the
keys two vectors U and V per pair, cos(p w) U + sin(p w) V.

The noise of codes is the same in all channels, but queries are not. Where no key basis was measured for the model, what
is left of a pair of channels is multiplied by (power of queries / power of what is left)^(1/4), which makes the
expected error of scores least; queries are divided by it.
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
BUDGET_SHARE = 1 / 16  # that turns may take of a head's bytes at the horizon
MAX_SAMPLE = 4096  # tokens that are measured
MAX_WEIGHT = 16.0
LARGEST_HALF = 65504.0


class Means(NamedTuple):
    """k_mean (batch, num_kv_heads, head_dim) float32; the others as ops take them, None: nothing of the kind."""

    k_mean: torch.Tensor
    k_turns: torch.Tensor | None = None
    turn_steps: torch.Tensor | None = None
    k_weights: torch.Tensor | None = None


def fixed_frequencies(config: Any, inv_freq: tuple[float, ...], head_dim: int) -> tuple[float, ...]:
    """``inv_freq`` where it holds for all lengths and all channels; else nothing, and means are constant."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    holds = parameters.get("rope_type") in FIXED_ROPE and 2 * len(inv_freq) == head_dim
    return inv_freq if holds and parameters.get("partial_rotary_factor", 1.0) == 1.0 else ()


def measure_queries(layer: SmartKVLayer, q: torch.Tensor) -> None:
    """Add the power of queries (batch, num_heads, q_len, head_dim) per pair of channels, until the first packing. Only
    of forwards of several tokens: a step of one does nothing more than it must."""
    config, store = layer.config, layer.store
    if q.shape[2] == 1 or not store.is_empty or config.key_basis is not None:
        return
    if not config.turn_freq or not config.quant.mean_shift:
        return
    step = -(-q.shape[2] // MAX_SAMPLE)
    valid = layer.window.held_positions()[:, -q.shape[2] :][:, None, ::step, None] >= 0
    power = torch.where(valid, q[:, :, ::step].float().square(), 0.0).sum(2)
    of_pairs = torch.stack(power.unflatten(1, (layer.window.shape[1], -1)).sum(2).chunk(2, -1)).sum(0)
    store.query_power = of_pairs if store.query_power is None else store.query_power + of_pairs


def measure_means(layer: SmartKVLayer) -> Means:
    """Of all keys in the window; fixed from the first packing on."""
    valid, keys = layer.window.held_positions() >= 0, layer.window.held("k")
    count = valid.sum(1).clamp(min=1)[:, None, None]
    mean = torch.where(valid[:, None, :, None], keys.float(), 0.0).sum(2) / count
    if not layer.config.turn_freq:
        return Means(mean)
    found = _choose(layer, mean)
    if found.k_turns is None or found.turn_steps is None:
        return found
    held = layer.window.held_positions()[:, None].expand(-1, keys.shape[1], -1)
    seen = torch.where(valid[:, None, :, None, None], waves(held, found.turn_steps), 0.0).sum(2) / count[..., None]
    return found._replace(k_mean=mean - torch.einsum("bhtw,bhtwd->bhd", seen, found.k_turns.float()))


def _choose(layer: SmartKVLayer, mean: torch.Tensor) -> Means:
    """Turns of the pairs that are worth it, with zeros for a head with fewer than others of the layer; and weights."""
    step = -(-layer.window.used // MAX_SAMPLE)
    positions, held = layer.window.held_positions()[:, ::step], layer.window.held("k")[:, :, ::step]
    valid = (positions >= 0)[:, None, :, None]
    count = valid.sum(2).clamp(min=1)
    frequency = torch.tensor(layer.config.turn_freq, dtype=torch.float64, device=held.device)
    # Mean before RoPE, as complex numbers: channels j and j + head_dim / 2 are a pair.
    keys = torch.where(valid, layer.basis.model_keys(held).float(), 0.0)
    angle = positions.double()[..., None] * frequency
    back = torch.polar(torch.ones_like(angle), -angle)[:, None].to(torch.complex64)
    before = (torch.complex(*keys.chunk(2, -1)) * back).sum(2) / count  # (batch, num_kv_heads, head_dim / 2)
    horizon = max(2 * layer.seen, LEAST_HORIZON)
    left = _left(frequency, horizon)

    unit = torch.eye(held.shape[-1], dtype=torch.float32, device=held.device).expand(1, held.shape[1], -1, -1)
    one, other = layer.basis.differences(unit).chunk(2, 2)  # (1, num_kv_heads, head_dim / 2, head_dim)
    a, b = before.real[..., None], before.imag[..., None]
    vectors = torch.stack([a * one + b * other, a * other - b * one], 3)
    power = vectors.square().sum((3, 4)) / 2
    if layer.config.key_basis is None:
        own_pairs = (torch.stack((keys.square().sum(2) / count).chunk(2, -1)).sum(0) - power).clamp(min=1e-30)
        weights = _pair_weights(layer.store.query_power, own_pairs)
        gain, own = power * left * weights.square(), (own_pairs * weights.square()).sum(-1)
    else:
        spread = torch.where(valid, held.float().square(), 0.0).sum((2, 3)) / count[..., 0] - mean.square().sum(-1)
        gain, own = power * left, spread - (power * _left(frequency, layer.seen)).sum(-1)
        own = own.clamp(min=1e-3 * spread.clamp(min=1e-30))
    worth = (gain > LEAST_GAIN * own[..., None]) & (vectors.abs().amax((3, 4)) < LARGEST_HALF)  # False for NaN
    gain, pairs = torch.where(worth, gain, 0.0).topk(_most_turns(layer, horizon), -1)
    turning = torch.zeros_like(worth).scatter(-1, pairs, gain > 0)
    found = Means(mean)
    if layer.store.query_power is not None:
        weights = _pair_weights(layer.store.query_power, own_pairs + torch.where(turning, 0.0, power * left))
        found = found._replace(k_weights=torch.cat([weights, weights], -1))
    most = int((gain > 0).sum(-1).max())
    if most == 0:
        return found
    pairs, used = pairs[..., :most], gain[..., :most, None, None] > 0
    steps = torch.where(used[..., 0, 0], _steps(frequency)[pairs], 0)
    vectors = vectors.gather(2, pairs[..., None, None].expand(-1, -1, -1, *vectors.shape[3:]))
    return found._replace(k_turns=torch.where(used, vectors, 0.0).half(), turn_steps=steps.contiguous())


def most_mean_bytes(layer: SmartKVLayer) -> int:
    """That means, turns and weights of one sequence may take in a layer."""
    _, heads, _, head_dim = layer.window.shape
    config, mean = layer.config, head_dim * torch.float32.itemsize
    if not config.turn_freq or not config.quant.mean_shift:
        return heads * mean
    return heads * (mean * (2 if config.key_basis is None else 1) + MAX_TURNS * _bytes_per_turn(head_dim))


def _bytes_per_turn(head_dim: int) -> int:
    return 2 * head_dim * torch.float16.itemsize + torch.int32.itemsize


def _most_turns(layer: SmartKVLayer, horizon: int) -> int:
    batch, heads, _, head_dim = layer.window.shape
    budget = int(BUDGET_SHARE * layer.config.layer_budget(horizon, batch, heads, layer.dtype.itemsize))
    affordable = budget // (heads * _bytes_per_turn(head_dim))
    return min(MAX_TURNS, head_dim // 2, affordable)


def _pair_weights(of_queries: torch.Tensor | None, of_keys: torch.Tensor) -> torch.Tensor:
    """(batch, num_kv_heads, head_dim / 2), of geometric mean 1; ones where queries are not known."""
    if of_queries is None:
        return torch.ones_like(of_keys)
    log = (of_queries.clamp(min=1e-30).log() - of_keys.clamp(min=1e-30).log()) / 4
    log = (log - log.mean(-1, keepdim=True)).nan_to_num(0.0)
    return log.clamp(-math.log(MAX_WEIGHT), math.log(MAX_WEIGHT)).exp()


def _steps(frequency: torch.Tensor) -> torch.Tensor:
    """Angles per position in units of 2^-32 turns: the bits of a uint32 as int32."""
    steps = (frequency * (2**32 / (2 * math.pi))).round().long()
    return ((steps + 2**31) % 2**32 - 2**31).to(torch.int32)


def _left(frequency: torch.Tensor, tokens: int) -> torch.Tensor:
    """Share of a turning mean's power that its own mean over ``tokens`` positions leaves: 1 - |mean of e^ipw|^2."""
    half = frequency / 2
    coherence = (half * tokens).sin() / (tokens * half.sin())
    return (1 - coherence.square()).float()
