"""fp32 reference of quantize_kv, dequantize_kv, append_kv and compact_kv.

Encoding of a vector x (key minus its shift, turns.py, or value): y = H x, code = nearest level of y / scale0, then
the scale fitted to those codes (FITS), stored as float16. Nothing is shared between records: each can be moved or
demoted alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .hadamard import rotate
from .layout import PAGE_SIZE, PageLayout, kv_bits, pack_codes, page_layout, page_positions, page_scores, unpack_codes
from .levels import gaussian_unit, level_table
from .turns import key_shift

FP16_MAX = 65504.0


def _ratio(power: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    return torch.where(product == 0, 0.0, power / product)


# Scale of y for its levels x. Least squares shortens y to (1 - D) y on average, D its relative distortion; keys of the
# right norm and values without that bias lose a fifth less KL (docs/design/quality.md, "The scale").
FITS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "least_squares": lambda y, x: (y * x).sum(-1) / x.square().sum(-1),
    "norm": lambda y, x: (y.square().sum(-1) / x.square().sum(-1)).sqrt(),  # |decoded| = |y|
    "unbiased": lambda y, x: _ratio(y.square().sum(-1), (y * x).sum(-1)),  # <y, decoded> = <y, y>
}
K_FIT, V_FIT = "norm", "unbiased"


def encode(y: torch.Tensor, bits: int, levels: str, fit: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated vectors y (..., head_dim) float32 -> codes (..., head_dim) int32, scale (...,) float16.

    ``fit`` names one of FITS and matters for Gaussian levels below 8 bits alone.
    """
    table = level_table(bits, levels).to(y.device)
    if bits == 8:
        scale = y.abs().amax(-1) / 127
    elif levels == "uniform":
        scale = y.abs().amax(-1) / (2**bits - 1)
    else:
        scale = y.square().mean(-1).sqrt() * gaussian_unit(bits)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    x = y * inverse[..., None]
    if bits == 8:
        codes = torch.round(x).clamp(-127, 127).int() + 128
    else:
        codes = torch.bucketize(x, (table[1:] + table[:-1]) / 2).int()  # midpoints strictly below x
        if levels == "gaussian":
            scale = FITS[fit](y, table[codes.long()])
    return codes, scale.clamp(max=FP16_MAX).half()


def decode(codes: torch.Tensor, scale: torch.Tensor, bits: int, levels: str) -> torch.Tensor:
    """Rotated vectors (..., head_dim) float32."""
    return level_table(bits, levels).to(codes.device)[codes.long()] * scale.float()[..., None]


def _rotated_kv(
    k: torch.Tensor, v: torch.Tensor, shift: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    own = k.float() - shift
    return rotate(own if weights is None else own * weights), rotate(v)


def _write(pages: torch.Tensor, layout: PageLayout, slot: int, record: dict[str, torch.Tensor]) -> None:
    """Write one record into slot of one page (page_bytes,). k and v are raw values, or codes with their scales."""
    for kind in "kv":
        section = pages[layout.section(kind)]
        if layout.tier == 16:
            values = record[kind]
            section.view(values.dtype).view(PAGE_SIZE, -1)[slot] = values
            continue
        codes = unpack_codes(section, layout.bits(kind), layout.head_dim, kind)
        codes[slot] = record[kind]
        section.copy_(pack_codes(codes, layout.bits(kind), kind))
        pages[layout.scales(kind)].view(torch.float16)[slot] = record[kind + "_scale"]
    page_positions(pages, layout)[slot] = record["position"]
    page_scores(pages, layout)[slot] = record["score"].to(torch.bfloat16)


def _read(pages: torch.Tensor, layout: PageLayout, slot: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inverse of _write."""
    record = {
        "position": page_positions(pages, layout)[slot].clone(),
        "score": page_scores(pages, layout)[slot].clone(),
    }
    for kind in "kv":
        section = pages[layout.section(kind)]
        if layout.tier == 16:
            record[kind] = section.view(dtype).view(PAGE_SIZE, -1)[slot].clone()
            continue
        record[kind] = unpack_codes(section, layout.bits(kind), layout.head_dim, kind)[slot]
        record[kind + "_scale"] = pages[layout.scales(kind)].view(torch.float16)[slot].clone()
    return record


def _record(
    k: torch.Tensor,
    v: torch.Tensor,
    shift: torch.Tensor,
    weights: torch.Tensor | None,
    position: torch.Tensor,
    score: torch.Tensor,
    tier: int,
    levels: str,
) -> dict[str, torch.Tensor]:
    """Encode one token (head_dim,) for a tier; shift and weights as k."""
    record = {"k": k, "v": v, "position": position, "score": score}
    if tier != 16:
        k_bits, v_bits = kv_bits(tier)
        ky, vy = _rotated_kv(k[None], v[None], shift[None], weights)
        record["k"], record["k_scale"] = (x[0] for x in encode(ky, k_bits, levels, K_FIT))
        record["v"], record["v_scale"] = (x[0] for x in encode(vy, v_bits, levels, V_FIT))
    return record


def quantize_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_mean: torch.Tensor,
    positions: torch.Tensor,
    scores: torch.Tensor,
    bits: int,
    levels: str,
    k_turns: torch.Tensor | None = None,
    turn_steps: torch.Tensor | None = None,
    k_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """See smartkv_ext.ops.quantize_kv."""
    batch, heads, kv_len, head_dim = k.shape
    layout = page_layout(bits, head_dim, k.element_size())
    num_pages = -(-kv_len // PAGE_SIZE)
    pad = num_pages * PAGE_SIZE - kv_len
    pages = torch.zeros(batch, heads, num_pages, layout.page_bytes, dtype=torch.uint8, device=k.device)

    def paged(x: torch.Tensor, value: int = 0) -> torch.Tensor:
        padding = (*(0, 0) * (x.dim() - 3), 0, pad)
        out: torch.Tensor = torch.nn.functional.pad(x, padding, value=value).unflatten(2, (num_pages, PAGE_SIZE))
        return out

    valid = paged(torch.ones_like(positions, dtype=torch.bool))
    page_positions(pages, layout).copy_(paged(positions, -1))
    page_scores(pages, layout).copy_(paged(scores.to(torch.bfloat16)))
    if bits == 16:
        for kind, x in (("k", k), ("v", v)):
            pages[..., layout.section(kind)].view(x.dtype).copy_(paged(x).flatten(3))
        return pages
    shift = key_shift(k_mean, positions, k_turns, turn_steps)
    weights = None if k_weights is None else k_weights[:, :, None]
    for kind, y in zip("kv", _rotated_kv(k, v, shift, weights), strict=True):
        codes, scale = encode(y, layout.bits(kind), levels, K_FIT if kind == "k" else V_FIT)
        codes = paged(codes) * valid[..., None]
        pages[..., layout.section(kind)] = pack_codes(codes, layout.bits(kind), kind)
        pages[..., layout.scales(kind)].view(torch.float16).copy_(paged(scale))
    return pages


def dequantize_kv(
    pages: torch.Tensor,
    k_mean: torch.Tensor,
    head_dim: int,
    bits: int,
    levels: str,
    dtype: torch.dtype,
    k_turns: torch.Tensor | None = None,
    turn_steps: torch.Tensor | None = None,
    k_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See smartkv_ext.ops.dequantize_kv."""
    layout = page_layout(bits, head_dim, dtype.itemsize)
    if bits == 16:
        k, v = (pages[..., layout.section(x)].view(dtype).unflatten(-1, (PAGE_SIZE, head_dim)) for x in "kv")
        return k.flatten(2, 3).clone(), v.flatten(2, 3).clone()
    out = []
    for kind in "kv":
        codes = unpack_codes(pages[..., layout.section(kind)], layout.bits(kind), head_dim, kind)
        scale = pages[..., layout.scales(kind)].view(torch.float16)
        out.append(rotate(decode(codes, scale, layout.bits(kind), levels), inverse=True).flatten(2, 3))
    shift = key_shift(k_mean, page_positions(pages, layout).flatten(2), k_turns, turn_steps)
    own = out[0] if k_weights is None else out[0] / k_weights[:, :, None]
    return (own + shift).to(dtype), out[1].to(dtype)


def append_kv(
    pools: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_mean: torch.Tensor,
    positions: torch.Tensor,
    scores: torch.Tensor,
    tiers: torch.Tensor,
    tier_bits: Sequence[int],
    levels: str,
    k_turns: torch.Tensor | None = None,
    turn_steps: torch.Tensor | None = None,
    k_weights: torch.Tensor | None = None,
) -> None:
    """See smartkv_ext.ops.append_kv."""
    batch, heads, new, head_dim = k.shape
    shift = key_shift(k_mean, positions, k_turns, turn_steps)
    for b in range(batch):
        for h in range(heads):
            for i in range(new):
                t = int(tiers[b, h, i])
                if t < 0:
                    continue
                layout = page_layout(tier_bits[t], head_dim, k.element_size())
                n = int(cache_seqlens[b, h, t])
                page = pools[t][int(block_table[b, h, t, n // PAGE_SIZE])]
                weights = None if k_weights is None else k_weights[b, h]
                record = _record(
                    k[b, h, i],
                    v[b, h, i],
                    shift[b, h, i],
                    weights,
                    positions[b, h, i],
                    scores[b, h, i],
                    tier_bits[t],
                    levels,
                )
                _write(page, layout, n % PAGE_SIZE, record)
                cache_seqlens[b, h, t] = n + 1


def _demote(
    record: dict[str, torch.Tensor],
    shift_at: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor | None,
    tier: int,
    new_tier: int,
    levels: str,
) -> dict[str, torch.Tensor]:
    """Re-encode a record for a lower tier; quantised records stay in the rotated space, and what keeps its bits stays
    as it is. shift_at(position): what the key loses if it was raw."""
    if tier == 16:
        shift = shift_at(record["position"])
        return _record(record["k"], record["v"], shift, weights, record["position"], record["score"], new_tier, levels)
    out = dict(record)
    for kind, bits, new_bits in zip("kv", kv_bits(tier), kv_bits(new_tier), strict=True):
        if bits == new_bits:
            continue
        y = decode(record[kind], record[kind + "_scale"], bits, levels)
        out[kind], out[kind + "_scale"] = encode(y, new_bits, levels, K_FIT if kind == "k" else V_FIT)
    return out


def compact_kv(
    pools: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    targets: torch.Tensor,
    k_mean: torch.Tensor,
    tier_bits: Sequence[int],
    levels: str,
    dtype: torch.dtype,
    k_turns: torch.Tensor | None = None,
    turn_steps: torch.Tensor | None = None,
    k_weights: torch.Tensor | None = None,
) -> None:
    """See smartkv_ext.ops.compact_kv. Tiers are ascending, so demotions always go to a smaller index."""
    head_dim = k_mean.shape[-1]
    layouts = [page_layout(tier, head_dim, dtype.itemsize) for tier in tier_bits]
    batch, heads, num_tiers, _ = block_table.shape
    for b in range(batch):
        for h in range(heads):

            def slot(t: int, i: int, b: int = b, h: int = h) -> tuple[torch.Tensor, PageLayout, int]:
                return pools[t][int(block_table[b, h, t, i // PAGE_SIZE])], layouts[t], i % PAGE_SIZE

            def shift_at(position: torch.Tensor, b: int = b, h: int = h) -> torch.Tensor:
                turns = (x if x is None else x[b : b + 1, h : h + 1] for x in (k_turns, turn_steps))
                return key_shift(k_mean[b : b + 1, h : h + 1], position.view(1, 1, 1), *turns)[0, 0, 0]

            lengths = [int(n) for n in cache_seqlens[b, h]]
            for t in range(num_tiers):
                target = targets[b, h, t].tolist()
                low, high = 0, lengths[t] - 1  # fill the lowest hole with the highest survivor
                while True:
                    while low <= high and target[low] == t:
                        low += 1
                    while low < high and target[high] != t:
                        high -= 1
                    if low >= high:
                        break
                    _write(*slot(t, low), _read(*slot(t, high), dtype))
                    low, high = low + 1, high - 1
                n = low
                for s in range(num_tiers - 1, t, -1):  # then the demoted, from the highest tier down
                    for i in range(lengths[s]):
                        if int(targets[b, h, s, i]) == t:
                            weights = None if k_weights is None else k_weights[b, h]
                            record = _demote(
                                _read(*slot(s, i), dtype), shift_at, weights, tier_bits[s], tier_bits[t], levels
                            )
                            _write(*slot(t, n), record)
                            n += 1
                cache_seqlens[b, h, t] = n
