"""fp32 reference of decode_attention, attention_mass and merge_states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import PAGE_SIZE, page_layout, page_positions
from .quantizer import dequantize_kv


def _gather_pages(pool: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    return pool[table[: -(-length // PAGE_SIZE)].long()]


def decode_attention(
    q: torch.Tensor,
    pools: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    k_mean: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    window_positions: torch.Tensor,
    q_start: torch.Tensor | int,
    tier_bits: Sequence[int],
    levels: str,
    softmax_scale: float,
    sliding_window: int = 0,
    return_mass: bool = False,
    k_turns: torch.Tensor | None = None,
    turn_steps: torch.Tensor | None = None,
    k_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See smartkv_ext.ops.decode_attention. Plain softmax over the dequantised tokens of each head."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, num_tiers, max_pages = block_table.shape[1:]
    groups = num_heads // num_kv_heads
    out = torch.zeros(batch, num_heads, q_len, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=torch.float32, device=q.device)
    mass = torch.zeros(batch, num_kv_heads, num_tiers, max_pages * PAGE_SIZE, dtype=torch.float32, device=q.device)
    window_mass = torch.zeros(batch, num_kv_heads, k_window.shape[2], dtype=torch.float32, device=q.device)
    q_positions = q_start + torch.arange(q_len, device=q.device)
    for b in range(batch):
        for h in range(num_kv_heads):
            turns = [x if x is None else x[b : b + 1, h : h + 1] for x in (k_turns, turn_steps, k_weights)]
            keys, values, positions = [k_window[b, h].float()], [v_window[b, h].float()], [window_positions[b]]
            for t, bits in enumerate(tier_bits):
                n = int(cache_seqlens[b, h, t])
                pages = _gather_pages(pools[t], block_table[b, h, t], n)[None, None]
                k, v = dequantize_kv(
                    pages,
                    k_mean[b : b + 1, h : h + 1],
                    head_dim,
                    bits,
                    levels,
                    q.dtype if bits == 16 else torch.float32,
                    *turns,
                )
                layout = page_layout(bits, head_dim, q.element_size())
                keys.append(k[0, 0, :n].float())
                values.append(v[0, 0, :n].float())
                positions.append(page_positions(pages, layout).flatten()[:n])
            key, value, position = torch.cat(keys), torch.cat(values), torch.cat(positions)
            allowed = (position[None] >= 0) & (position[None] <= q_positions[:, None])
            if sliding_window > 0:
                allowed &= position[None] > q_positions[:, None] - sliding_window
            heads = slice(h * groups, (h + 1) * groups)
            # A zero weight must not let a NaN through: unwritten window slots may hold anything.
            value = torch.where(allowed.any(0)[:, None], value, 0.0)
            scores = (q[b, heads].float() @ key.T * softmax_scale).masked_fill(~allowed, -torch.inf)
            row_lse = scores.logsumexp(-1)
            probs = torch.exp(scores - row_lse.clamp(min=torch.finfo(torch.float32).min)[..., None])
            out[b, heads], lse[b, heads] = probs @ value, row_lse
            received = probs.sum((0, 1))
            w = k_window.shape[2]
            window_mass[b, h] = received[:w]
            for t in range(num_tiers):
                n = int(cache_seqlens[b, h, t])
                mass[b, h, t, :n] = received[w : w + n]
                w += n
    if not return_mass:
        mass, window_mass = mass.new_zeros(0), window_mass.new_zeros(0)
    return out.to(q.dtype), lse, mass, window_mass


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    k_positions: torch.Tensor,
    q_start: torch.Tensor | int,
    softmax_scale: float,
    sliding_window: int = 0,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """See smartkv_ext.ops.attention_mass."""
    groups = q.shape[1] // k.shape[1]
    q_positions = q_start + torch.arange(q.shape[2], device=q.device)
    position = k_positions[:, None, None, :]
    allowed = (position >= 0) & (position <= q_positions[:, None])
    if sliding_window > 0:
        allowed &= position > q_positions[:, None] - sliding_window
    scores = q.float() @ k.float().repeat_interleave(groups, 1).transpose(-1, -2) * softmax_scale
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse
    probs = torch.exp(scores - lse.clamp(min=torch.finfo(torch.float32).min)[..., None])
    mass: torch.Tensor = probs.sum(2).unflatten(1, (k.shape[1], groups)).sum(2)
    return mass


def merge_states(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See smartkv_ext.ops.merge_states."""
    merged = lse.logsumexp(0)
    weight = torch.exp(lse - merged.clamp(min=torch.finfo(torch.float32).min))
    weighted = torch.where(weight[..., None] == 0, 0.0, o.float() * weight[..., None])
    return weighted.sum(0).to(o.dtype), merged
