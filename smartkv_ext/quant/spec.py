"""Which tiers a cache may use and how its records are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smartkv_ext.reference.layout import BITS, PageLayout, page_layout
from smartkv_ext.reference.levels import LEVELS, RELATIVE_DISTORTION


@dataclass(frozen=True)
class QuantSpec:
    """Tiers in ascending bits, the reconstruction levels, and whether keys are shifted by their mean (docs/design)."""

    tiers: tuple[int, ...] = BITS
    levels: str = "gaussian"
    mean_shift: bool = True

    @classmethod
    def create(cls, tiers: Sequence[int], levels: str, mean_shift: bool) -> QuantSpec:
        """Check and sort. Raises ValueError naming the argument."""
        tiers = tuple(sorted(tiers))
        if not tiers or len(set(tiers)) != len(tiers) or any(t not in BITS for t in tiers):
            raise ValueError(f"tiers must be distinct values of {', '.join(map(str, BITS))}; got {list(tiers)}")
        if levels not in LEVELS:
            raise ValueError(f"levels must be one of {', '.join(LEVELS)}; got {levels!r}")
        return cls(tiers, levels, bool(mean_shift))

    def layouts(self, head_dim: int, dtype: torch.dtype) -> list[PageLayout]:
        """One page layout per tier."""
        return [page_layout(bits, head_dim, dtype.itemsize) for bits in self.tiers]

    @property
    def distortion(self) -> list[float]:
        """Relative squared error that each tier leaves."""
        return [RELATIVE_DISTORTION[bits] for bits in self.tiers]
