"""Which tiers a cache may use and how its records are encoded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from smartkv_ext.reference.layout import TIERS, PageLayout, page_layout, tier_name
from smartkv_ext.reference.levels import LEVELS

# What a token loses at a tier, relative to being evicted. Not the relative squared error of its codes (0.12 at 2 bits):
# noise in keys passes through an exponential, so low bits lose more than in proportion. Fitted to KL on training texts
# (docs/design/quality.md); 8 bits are the squared error.
TIER_LOSS = {2: 0.25, 302: 0.1, 3: 0.07, 403: 0.03, 4: 0.02, 8: 4.0e-5, 16: 0.0}
# 2 and 3 bits for both lose more per byte than their neighbours do.
DEFAULT_TIERS = (302, 403, 4, 8, 16)
_ACCEPTED = ", ".join(map(tier_name, TIERS))

_BY_NAME = {tier_name(tier): tier for tier in TIERS} | {str(tier): tier for tier in TIERS}


def default_tiers(evicts: bool) -> tuple[int, ...]:
    """For a policy that evicts, and for one that keeps every token, at 2 bits if it must."""
    return DEFAULT_TIERS if evicts else (2, *DEFAULT_TIERS)


@dataclass(frozen=True)
class QuantSpec:
    """Tiers in ascending order, the reconstruction levels, and whether keys are shifted by their mean (docs/design)."""

    tiers: tuple[int, ...] = DEFAULT_TIERS
    levels: str = "gaussian"
    mean_shift: bool = True

    @classmethod
    def create(cls, tiers: Sequence[int | str], levels: str, mean_shift: bool) -> QuantSpec:
        """Check and sort. Raises ValueError or TypeError naming the argument."""
        if not isinstance(tiers, Collection) or isinstance(tiers, str) or any(
            isinstance(t, bool) or not isinstance(t, (int, str)) for t in tiers
        ):  # fmt: skip
            raise TypeError(f"tiers must be a sequence of bits, of {_ACCEPTED}; got {tiers!r}")
        chosen = [_BY_NAME.get(str(t).strip().upper()) for t in tiers]
        known = [t for t in chosen if t is not None]
        if not known or len(set(known)) != len(chosen):
            raise ValueError(f"tiers must be distinct values of {_ACCEPTED}; got {list(tiers)}")
        chosen_tiers = tuple(sorted(known, key=TIERS.index))
        if not isinstance(levels, str) or levels not in LEVELS:
            raise ValueError(f"levels must be one of {', '.join(LEVELS)}; got {levels!r}")
        return cls(chosen_tiers, levels, bool(mean_shift))

    def layouts(self, head_dim: int, dtype: torch.dtype) -> list[PageLayout]:
        """One page layout per tier."""
        return [page_layout(tier, head_dim, dtype.itemsize) for tier in self.tiers]

    @property
    def loss(self) -> list[float]:
        """What a token loses at each tier, relative to being evicted."""
        return [TIER_LOSS[tier] for tier in self.tiers]
