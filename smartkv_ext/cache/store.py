"""The packed part of one layer: pages of records per (sequence, KV head, tier), in one pool per tier."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from smartkv_ext import ops
from smartkv_ext.quant import QuantSpec
from smartkv_ext.reference.layout import PAGE_SIZE, PageLayout, page_positions, page_scores

from .turning import Means


def _num_pages(records: torch.Tensor) -> torch.Tensor:
    return (records + PAGE_SIZE - 1) // PAGE_SIZE


def _order(mask: torch.Tensor) -> torch.Tensor:
    """Index of every True among all of them; no host synchronisation, unlike indexing by a mask."""
    return mask.flatten().cumsum(0).view_as(mask) - 1


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class PagedStore:
    """Owns the pools, the block table and the record counts of a layer. All state is in plain tensors.

    Pools are exactly as large as the pages in use: ``update`` grows them before it writes and trims them after it has
    evicted, so freed bytes go back to the allocator at once and there is no slack but the unused slots of open pages.
    """

    def __init__(
        self, spec: QuantSpec, batch: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self.layouts: list[PageLayout] = spec.layouts(head_dim, dtype)
        tiers = len(spec.tiers)
        self.pools = [torch.empty(0, x.page_bytes, dtype=torch.uint8, device=device) for x in self.layouts]
        self.block_table = torch.empty(batch, num_kv_heads, tiers, 0, dtype=torch.int32, device=device)
        # Shared by all stores until the first record, so that a context that is not packed pays for no tables.
        self.cache_seqlens = _zeros((batch, num_kv_heads, tiers), torch.int32, device)
        self.k_mean = _zeros((batch, num_kv_heads, head_dim), torch.float32, device)
        self._has_means = False
        self.k_turns: torch.Tensor | None = None  # what of the mean turns: see turning.py
        self.turn_steps: torch.Tensor | None = None
        self.k_weights: torch.Tensor | None = None
        self.query_power: torch.Tensor | None = None  # until the first packing: what weights are measured on

    def set_means(self, means: Means) -> None:
        """What quantised keys lose and are multiplied by, before the first is packed."""
        self.k_mean, self.k_turns, self.turn_steps, self.k_weights = means
        self.query_power, self._has_means = None, True

    @property
    def nbytes(self) -> int:
        """Bytes of pools, tables and means; what is shared does not count."""
        return self.mean_bytes + self.table_bytes + sum(x.nbytes for x in self.pools)

    @property
    def table_bytes(self) -> int:
        """Of block table and lengths."""
        return 0 if self.is_empty else self.block_table.nbytes + self.cache_seqlens.nbytes

    @property
    def is_empty(self) -> bool:
        """True while no record was ever packed (no host synchronisation)."""
        return self.block_table.shape[3] == 0

    def _means(self) -> dict[str, torch.Tensor]:
        names = ("k_mean", "k_turns", "turn_steps", "k_weights", "query_power")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def mean_bytes(self) -> int:
        """Of the mean keys, with turns and weights, and of what they are measured on."""
        shared = 0 if self._has_means else self.k_mean.nbytes
        return sum(x.nbytes for x in self._means().values()) - shared

    # -- reading ---------------------------------------------------------------------------------------------------

    def slot_mask(self) -> torch.Tensor:
        """(batch, num_kv_heads, num_tiers, max_pages * 64) bool: slots that hold a record."""
        slots = torch.arange(self.block_table.shape[3] * PAGE_SIZE, device=self.block_table.device)
        return slots < self.cache_seqlens[..., None]

    def positions(self) -> torch.Tensor:
        """(batch, num_kv_heads, num_tiers, max_pages * 64) int32, -1 in empty slots."""
        return self._gather(page_positions).masked_fill_(~self.slot_mask(), -1)

    def scores(self) -> torch.Tensor:
        """(batch, num_kv_heads, num_tiers, max_pages * 64) float32, -inf in empty slots."""
        return self._gather(page_scores).float().masked_fill_(~self.slot_mask(), -torch.inf)

    def _gather(self, section: Callable[[torch.Tensor, PageLayout], torch.Tensor]) -> torch.Tensor:
        parts = []
        for t, (pool, layout) in enumerate(zip(self.pools, self.layouts, strict=True)):
            view = section(pool, layout)
            ids = self.block_table[:, :, t].long().clamp(min=0, max=max(len(pool) - 1, 0))
            shape = (*ids.shape, PAGE_SIZE)
            parts.append(view[ids] if len(pool) else view.new_zeros(shape))
        return torch.stack(parts, 2).flatten(3)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values (batch, num_kv_heads, slots, head_dim) and positions (batch, num_kv_heads, slots) of all tiers.

        For tests and reports; empty slots have position -1 and arbitrary values.
        """
        keys, values = [], []
        for t, tier in enumerate(self.spec.tiers):
            ids = self.block_table[:, :, t].long().clamp(min=0, max=max(len(self.pools[t]) - 1, 0))
            pool = self.pools[t] if len(self.pools[t]) else self.pools[t].new_zeros(1, self.pools[t].shape[1])
            stored = self.dtype if tier == 16 else torch.float32
            k, v = ops.dequantize_kv(
                pool[ids], self.k_mean, self.k_mean.shape[-1], tier, self.spec.levels, stored,
                self.k_turns, self.turn_steps, self.k_weights,
            )  # fmt: skip
            keys.append(k.to(dtype))
            values.append(v.to(dtype))
        return torch.cat(keys, 2), torch.cat(values, 2), self.positions().flatten(2)

    # -- writing ---------------------------------------------------------------------------------------------------

    def write_scores(self, scores: torch.Tensor) -> None:
        """Replace the scores of all records; scores as returned by ``scores()``."""
        mask = self.slot_mask()
        for t, (pool, layout) in enumerate(zip(self.pools, self.layouts, strict=True)):
            ids = self.block_table[:, :, t].long()
            slots = ids[..., None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=ids.device)
            used = mask[:, :, t]
            view = page_scores(pool, layout)
            page, slot = slots.flatten(2)[used] // PAGE_SIZE, slots.flatten(2)[used] % PAGE_SIZE
            view[page, slot] = scores[:, :, t][used].to(torch.bfloat16)

    def update(self, targets: torch.Tensor | None, new: dict[str, torch.Tensor] | None) -> None:
        """Move, demote and evict the present records, then pack new tokens.

        targets: (batch, num_kv_heads, num_tiers, max_pages * 64) int8, as for ``ops.compact_kv``; None: leave all as
        is.
        new: k, v (batch, num_kv_heads, n, head_dim); positions int32, scores float32, tiers int8 (batch,
        num_kv_heads, n).
        """
        tiers = range(len(self.spec.tiers))
        if self.is_empty:
            self.cache_seqlens = self.cache_seqlens.clone()
        if targets is None:
            kept = self.cache_seqlens
        else:
            held = torch.where(self.slot_mask(), targets, -1)
            kept = torch.stack([(held == t).sum((2, 3)) for t in tiers], -1)
        added = torch.stack([(new["tiers"] == t).sum(2) for t in tiers], -1) if new else 0
        self._reserve(kept + added)
        if targets is not None:
            targets = torch.nn.functional.pad(
                held, (0, self.block_table.shape[3] * PAGE_SIZE - held.shape[3]), value=-1
            )
            ops.compact_kv(
                self.pools, self.block_table, self.cache_seqlens, targets, self.k_mean,
                self.spec.tiers, self.spec.levels, self.dtype, self.k_turns, self.turn_steps, self.k_weights,
            )  # fmt: skip
        if new:
            ops.append_kv(
                self.pools, self.block_table, self.cache_seqlens, new["k"], new["v"], self.k_mean,
                new["positions"], new["scores"], new["tiers"], self.spec.tiers, self.spec.levels,
                self.k_turns, self.turn_steps, self.k_weights,
            )  # fmt: skip
        self._trim()

    def _page_mask(self, records: torch.Tensor) -> torch.Tensor:
        """(..., max_pages) bool: block table entries that ``records`` (...) need."""
        return torch.arange(self.block_table.shape[3], device=records.device) < _num_pages(records)[..., None]

    def _counts(self, pages: torch.Tensor) -> tuple[list[int], int]:
        """Sums per tier and maximum of ``pages`` (batch, num_kv_heads, num_tiers). The one thing that the host must
        know, since it allocates, and asks for once.
        """
        *sums, most = torch.cat([pages.sum((0, 1)), pages.max()[None]]).tolist()
        return sums, most

    def _reserve(self, records: torch.Tensor) -> None:
        """Add pages so that ``records`` (batch, num_kv_heads, num_tiers) fit beside what is there now."""
        pages, present = _num_pages(records), _num_pages(self.cache_seqlens)
        counts, most = self._counts(torch.maximum(pages, present))
        missing = most - self.block_table.shape[3]
        if missing > 0:
            self.block_table = torch.nn.functional.pad(self.block_table, (0, missing), value=-1)
        wanted = self._page_mask(records) & ~self._page_mask(self.cache_seqlens)
        for t, pool in enumerate(self.pools):
            if counts[t] > len(pool):  # a pool has no more pages than are in use
                self._number_pages(t, _order(wanted[:, :, t]) + len(pool), wanted[:, :, t])
                grown = ops.empty_pool(counts[t], pool.shape[1], pool.device)
                grown[: len(pool)] = pool
                grown[len(pool) :].zero_()
                self.pools[t] = grown

    def _trim(self) -> None:
        """Give back pages that no head uses; the block table loses its unused columns."""
        used = self._page_mask(self.cache_seqlens)
        self.block_table.masked_fill_(~used, -1)
        counts, most = self._counts(_num_pages(self.cache_seqlens))
        for t, pool in enumerate(self.pools):
            if counts[t] < len(pool):
                order = _order(used[:, :, t])
                # Entries without a page go to a place behind the last.
                place = torch.where(used[:, :, t], order, counts[t]).flatten()
                ids = place.new_zeros(counts[t] + 1).scatter_(0, place, self.block_table[:, :, t].flatten().long())
                kept = ops.empty_pool(counts[t], pool.shape[1], pool.device)
                self.pools[t] = torch.index_select(pool, 0, ids[: counts[t]], out=kept)
                self._number_pages(t, order, used[:, :, t])
        if most < self.block_table.shape[3]:
            self.block_table = self.block_table[..., :most].contiguous()

    def _number_pages(self, tier: int, ids: torch.Tensor, where: torch.Tensor) -> None:
        table = self.block_table[:, :, tier]
        table.copy_(torch.where(where, ids, table))

    # -- batch -----------------------------------------------------------------------------------------------------

    def index_select(self, index: torch.Tensor) -> None:
        """Make row i a copy of the old row index[i]; rows that nobody takes give their pages back."""
        if self.is_empty:
            tables, power = (self.cache_seqlens, self.k_mean), self.query_power
            self.cache_seqlens, mean = (_zeros((len(index), *x.shape[1:]), x.dtype, x.device) for x in tables)
            self.set_means(Means(mean))  # measured anew by the first packing that finds something to pack
            self._has_means, self.query_power = False, None if power is None else power.index_select(0, index)
            self.block_table = self.block_table.index_select(0, index)
            return
        self.cache_seqlens = self.cache_seqlens.index_select(0, index)
        for name, x in self._means().items():
            setattr(self, name, x.index_select(0, index))
        table = self.block_table.index_select(0, index)
        used = torch.arange(table.shape[3], device=table.device) < _num_pages(self.cache_seqlens)[..., None]
        for t, pool in enumerate(self.pools):
            mask = used[:, :, t]
            self.pools[t] = pool[table[:, :, t][mask].long()]
            table[:, :, t][mask] = torch.arange(int(mask.sum()), dtype=torch.int32, device=pool.device)
        self.block_table = table

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name: what is saved, loaded and counted."""
        named = {"block_table": self.block_table, "cache_seqlens": self.cache_seqlens} | self._means()
        if self.is_empty:  # what stores share, no two may give away
            named = {name: x.clone() for name, x in named.items()}
        return named | {f"pages_{tier}": pool for tier, pool in zip(self.spec.tiers, self.pools, strict=True)}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of ``tensors``."""
        self.block_table, self.cache_seqlens = tensors["block_table"], tensors["cache_seqlens"]
        self.set_means(Means(tensors["k_mean"], *(tensors.get(x) for x in Means._fields[1:])))
        self.query_power = tensors.get("query_power")
        self._has_means = not self.is_empty or bool(self.k_mean.any())
        if self.is_empty:  # as a new store
            self.cache_seqlens = _zeros(tuple(self.cache_seqlens.shape), torch.int32, self.cache_seqlens.device)
        if not self._has_means:
            self.k_mean = _zeros(tuple(self.k_mean.shape), torch.float32, self.k_mean.device)
        self.pools = [tensors[f"pages_{tier}"] for tier in self.spec.tiers]
