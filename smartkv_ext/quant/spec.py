"""Which tiers a cache may use and how its records are encoded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from smartkv_ext.reference.layout import BITS, PageLayout, page_layout
from smartkv_ext.reference.levels import LEVELS

# What a token loses at a tier, relative to being evicted. Not the relative squared error of its codes (0.12 at 2 bits):
# noise in keys passes through an exponential, so low bits lose more than in proportion. Fitted to KL on a training text
# (docs/design/quality.md); 4 and 8 bits are the squared error.
TIER_LOSS = {2: 0.25, 3: 0.045, 4: 0.0095, 8: 4.0e-5, 16: 0.0}


@dataclass(frozen=True)
class QuantSpec:
    """Tiers in ascending bits, the reconstruction levels, and whether keys are shifted by their mean (docs/design)."""

    tiers: tuple[int, ...] = BITS
    levels: str = "gaussian"
    mean_shift: bool = True

    @classmethod
    def create(cls, tiers: Sequence[int], levels: str, mean_shift: bool) -> QuantSpec:
        """Check and sort. Raises ValueError or TypeError naming the argument."""
        if not isinstance(tiers, Collection) or any(isinstance(t, bool) or not isinstance(t, int) for t in tiers):
            raise TypeError(f"tiers must be a sequence of bits, of {', '.join(map(str, BITS))}; got {tiers!r}")
        tiers = tuple(sorted(tiers))
        if not tiers or len(set(tiers)) != len(tiers) or any(t not in BITS for t in tiers):
            raise ValueError(f"tiers must be distinct values of {', '.join(map(str, BITS))}; got {list(tiers)}")
        if not isinstance(levels, str) or levels not in LEVELS:
            raise ValueError(f"levels must be one of {', '.join(LEVELS)}; got {levels!r}")
        return cls(tiers, levels, bool(mean_shift))

    def layouts(self, head_dim: int, dtype: torch.dtype) -> list[PageLayout]:
        """One page layout per tier."""
        return [page_layout(bits, head_dim, dtype.itemsize) for bits in self.tiers]

    @property
    def loss(self) -> list[float]:
        """What a token loses at each tier, relative to being evicted."""
        return [TIER_LOSS[bits] for bits in self.tiers]
