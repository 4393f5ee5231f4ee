"""Attention that tokens receive, for policies that accumulate it: measured by the attention ops as they run.

Tokens in the window have their sums beside their keys, as buffers of the window. Packed records carry what they had
received at the last packing step; what came since is here, float32, one slot per record slot of every page in use.
"""

from __future__ import annotations

import torch

from smartkv_ext.policies import Policy
from smartkv_ext.reference.layout import PAGE_SIZE

from .store import PagedStore

RECEIVED, RECENT = "received", "recent"


def meter_names(policy: Policy) -> tuple[str, ...]:
    """What is measured for a policy: nothing, ``received``, or that and ``recent``."""
    if not policy.accumulates:
        return ()
    return (RECEIVED, RECENT) if policy.recent_queries else (RECEIVED,)


def page_meter_bytes(policy: Policy) -> int:
    """Bytes that measuring adds to every page: its sums, and its place in the block table."""
    names = meter_names(policy)
    return 4 * PAGE_SIZE * len(names) + 4 * bool(names)


class AttentionMeter:
    """Sums over the pages in use, in the order of the block table: name -> (pages, 64) float32.

    ``pages`` (pages,) int32 are the entries of the flattened block table that name them: with a list that changes only
    when pages do, a decode step gathers by index and counts nothing, so the host need not wait for the device.
    """

    def __init__(self, policy: Policy, store: PagedStore) -> None:
        self.names = meter_names(policy)
        self.sums: dict[str, torch.Tensor] = {}
        self.restart(store)

    def restart(self, store: PagedStore) -> None:
        """Forget everything: the records are about to carry it, or have moved."""
        self.pages = self._pages_of(store)
        shape = (len(self.pages), PAGE_SIZE)
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float32, device=store.block_table.device) for name in self.names
        }

    def _pages_of(self, store: PagedStore) -> torch.Tensor:
        if not self.names:
            return store.block_table.new_empty(0)
        return (store.block_table.flatten() >= 0).nonzero().flatten().int()

    def add(self, name: str, mass: torch.Tensor) -> None:
        """Add the ``mass`` (batch, num_kv_heads, num_tiers, max_pages * 64) of a decode_attention."""
        self.sums[name] += self._by_page(mass)

    def spread(self, name: str, store: PagedStore) -> torch.Tensor:
        """A sum in the shape of ``store.scores()``; 0 in pages that do not exist."""
        table = store.block_table
        out = self.sums[name].new_zeros(*table.shape, PAGE_SIZE)
        out[table >= 0] = self.sums[name]
        return out.flatten(3)

    def index_select(self, index: torch.Tensor, store: PagedStore) -> None:
        """``store.index_select``, and the sums follow their records."""
        spread = {name: self.spread(name, store) for name in self.names}
        store.index_select(index)
        self.pages = self._pages_of(store)
        self.sums = {name: self._by_page(x.index_select(0, index)) for name, x in spread.items()}

    @property
    def nbytes(self) -> int:
        """What the sums and the list of pages hold."""
        return self.pages.nbytes + sum(x.nbytes for x in self.sums.values())

    def _by_page(self, slots: torch.Tensor) -> torch.Tensor:
        """(batch, num_kv_heads, num_tiers, max_pages * 64) -> (pages, 64)."""
        return slots.reshape(-1, PAGE_SIZE).index_select(0, self.pages)
