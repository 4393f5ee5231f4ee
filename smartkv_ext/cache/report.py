"""Exact accounting: what the allocators hold, by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from smartkv_ext.reference.layout import PAGE_SIZE, tier_name

if TYPE_CHECKING:
    from .layer import SmartKVLayer


@dataclass(frozen=True)
class CacheReport:
    """Bytes and tokens of a cache. ``parts`` adds up to ``total_bytes``; ``full_bytes`` is the bf16 cache of the
    same tokens."""

    total_bytes: int
    full_bytes: int
    parts: dict[str, int]
    tokens_seen: int  # longest sequence, padding not counted
    tokens_per_tier: dict[str, float]  # mean over layers, KV heads and sequences
    batch_size: int
    policy: str = ""  # its title: what "auto" chose, for one
    shared_bytes: int = 0  # gate weights and key basis, once per process for all caches: not in total_bytes
    key_basis_bytes: int = 0  # of shared_bytes; 0: keys are held as the model has them

    @property
    def ratio(self) -> float:
        """total_bytes / full_bytes."""
        return self.total_bytes / self.full_bytes if self.full_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ratio": self.ratio}

    def __str__(self) -> str:
        lines = [
            f"SmartKVCache: {self.total_bytes:,} of {self.full_bytes:,} bytes "
            f"({100 * self.ratio:.2f} % of the bf16 cache of {self.tokens_seen:,} tokens x {self.batch_size})"
        ]
        lines += [f"  {name:<16}{size:>14,}" for name, size in self.parts.items() if size]
        if self.shared_bytes:
            sizes = {"gate weights": self.shared_bytes - self.key_basis_bytes, "key basis": self.key_basis_bytes}
            what = " and ".join(name for name, size in sizes.items() if size)
            lines.append(f"  {'shared':<16}{self.shared_bytes:>14,}  {what}, shared by all caches, not counted above")
        if self.policy:
            lines.append(f"  policy          {self.policy}")
        kept = ", ".join(f"{name}: {count:.1f}" for name, count in self.tokens_per_tier.items() if count)
        return "\n".join([*lines, f"  tokens per head  {kept}"])


def layer_parts(layer: SmartKVLayer) -> dict[str, int]:
    """Bytes of one layer by part. Adds up to the bytes of its tensors."""
    window, store = layer.window, layer.store
    capacity = window.shape[2]
    per_slot = sum(x.nbytes for x in window.buffers.values()) // max(capacity, 1)
    parts = {
        "window": per_slot * (capacity - window.sink_slots) + window.positions.nbytes,
        "sinks": per_slot * window.sink_slots,
        "codes": 0,
        "scales": 0,
        "positions": 0,
        "scores": 0,
        "slack": 0,
        "block tables": store.block_table.nbytes,
        "lengths": store.table_bytes - store.block_table.nbytes + layer.row_tokens.nbytes,
        "means": store.mean_bytes,
        "policy state": sum(x.nbytes for x in layer.state.values())
        + layer.meter.nbytes
        + (0 if layer.queries is None else layer.queries.nbytes),
    }
    records = store.cache_seqlens.sum((0, 1)).tolist()
    for count, pool, layout in zip(records, store.pools, store.layouts, strict=True):
        codes = layout.section("v").stop // PAGE_SIZE
        scales = layout.position // PAGE_SIZE - codes
        parts["codes"] += count * codes
        parts["scales"] += count * scales
        parts["positions"] += count * 4
        parts["scores"] += count * 2
        parts["slack"] += pool.nbytes - count * layout.page_bytes // PAGE_SIZE
    return parts


def layer_bytes(layer: SmartKVLayer) -> int:
    """Bytes of all tensors of one layer, without waiting for the device."""
    if not layer.is_initialized:
        return 0
    parts = [*layer.window.tensors().values(), *layer.state.values(), layer.row_tokens]
    parts += [] if layer.queries is None else [layer.queries]
    return sum(x.nbytes for x in parts) + layer.store.nbytes + layer.meter.nbytes


def report(layers: list[SmartKVLayer]) -> CacheReport:
    """Report of all layers that hold something."""
    parts: dict[str, int] = {}
    active = [layer for layer in layers if layer.is_initialized]
    if not active:
        return CacheReport(0, 0, {}, 0, {}, 0)
    first = active[0]
    for layer in active:
        for name, size in layer_parts(layer).items():
            parts[name] = parts.get(name, 0) + size
    parts["lengths"] += first.clock.nbytes
    batch, heads = first.window.shape[:2]
    head_dim = first.config.geometry.head_dim
    rows = [int(layer.row_tokens.sum()) for layer in active]
    full = sum(n * heads * head_dim * 2 * 2 for n in rows)
    kept: dict[str, float] = {"window": 0.0}
    share = 1 / (len(active) * batch)
    for layer in active:
        kept["window"] += float((layer.window.held_positions() >= 0).sum()) * share
        counts = layer.store.cache_seqlens.float().mean(1).sum(0)
        for name, count in zip(map(tier_name, layer.config.quant.tiers), counts.tolist(), strict=True):
            kept[name] = kept.get(name, 0.0) + count * share
    kept["evicted"] = max(sum(rows) * share - sum(kept.values()), 0.0)
    longest = int(max(layer.row_tokens.max() for layer in active))
    policy, basis = first.config.policy, first.config.key_basis
    of_basis = 0 if basis is None else basis.num_bytes
    shared = policy.shared_bytes + of_basis
    return CacheReport(sum(parts.values()), full, parts, longest, kept, batch, policy.title, shared, of_basis)
