"""Reference of select_kv: one decision per token, evict or a tier, under a byte budget.

The page is the unit of allocation: a page's bytes are paid whole, so the plan buys whole pages. Tokens are ranked by
score; rank r is assumed to matter like 1 / (r + zipf_offset) (attention received is heavy-tailed), a tier costs
page_bytes and leaves the relative distortion of its quantiser, and pages are bought where weight x distortion removed
/ byte is greatest: the greedy solution, optimal on the convex hull up to one page, of the Lagrangian rate-distortion
problem (Shoham and Gersho, 1988).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .layout import PAGE_SIZE


def upgrade_path(
    page_bytes: Sequence[int], distortion: Sequence[float], evict_distortion: float
) -> list[tuple[int, int, float]]:
    """Lower convex hull from "evicted" through the tiers: [(tier, extra bytes, distortion removed per byte)]."""
    path: list[tuple[int, int, float]] = []
    tier, size, error = -1, 0, evict_distortion
    while True:
        best = None
        for t in range(tier + 1, len(page_bytes)):
            slope = (error - distortion[t]) / (page_bytes[t] - size)
            if slope > 0 and (best is None or slope > best[2]):
                best = (t, page_bytes[t] - size, slope)
        if best is None:
            return path
        path.append(best)
        tier, size, error = best[0], page_bytes[best[0]], distortion[best[0]]


def plan_pages(
    eligible: Sequence[int],
    budget: int,
    page_bytes: Sequence[int],
    distortion: Sequence[float],
    evict_distortion: float,
    zipf_offset: float,
) -> list[int]:
    """Pages to buy per tier. eligible[t] tokens may take tier t: those that are not in a lower one already.

    A page above the reach of some tokens is bought only where the others fill it: an open slot in it is lost to the
    rest.
    """
    num_tokens = eligible[0]
    limit = [-(-n // PAGE_SIZE) if n == num_tokens else n // PAGE_SIZE for n in eligible]
    taken_up = [0] * len(page_bytes)  # blocks at this tier or above
    path = upgrade_path(page_bytes, distortion, evict_distortion)
    upgrades = []
    for block in range(-(-num_tokens // PAGE_SIZE)):
        weight = 0.0
        for rank in range(block * PAGE_SIZE, min((block + 1) * PAGE_SIZE, num_tokens)):
            weight += 1.0 / (rank + zipf_offset)
        for step, (_, _, slope) in enumerate(path):
            upgrades.append((-weight * slope, block, step))
    upgrades.sort()
    level = [0] * -(-num_tokens // PAGE_SIZE)  # upgrades taken per block
    left = budget
    for _, block, step in upgrades:
        rises = range(path[step - 1][0] + 1 if step else 0, path[step][0] + 1)
        if level[block] == step and path[step][1] <= left and all(taken_up[t] < limit[t] for t in rises):
            left -= path[step][1]
            level[block] = step + 1
            for t in rises:
                taken_up[t] += 1
    pages = [0] * len(page_bytes)
    for taken in level:
        if taken:
            pages[path[taken - 1][0]] += 1
    return pages


def select_kv(
    scores: torch.Tensor,
    current: torch.Tensor,
    budgets: torch.Tensor,
    page_bytes: Sequence[int],
    distortion: Sequence[float],
    evict_distortion: float = 1.0,
    zipf_offset: float = 64.0,
) -> torch.Tensor:
    """See smartkv_ext.ops.select_kv."""
    groups, heads, n = scores.shape
    num_tiers = len(page_bytes)
    out = torch.full((groups, heads, n), -1, dtype=torch.int8)
    for g in range(groups):
        order = [
            (-float(scores[g, h, i]), -i, h)
            for h in range(heads)
            for i in range(n)
            if int(current[g, h, i]) >= 0 and float(scores[g, h, i]) > -math.inf
        ]
        order.sort()  # best score first; ties: newest first, then lower head
        budget = int(budgets[g])
        present = [int(current[g, h, -i]) for _, i, h in order]
        eligible = [sum(c >= t for c in present) for t in range(num_tiers)]
        pages = plan_pages(eligible, budget, page_bytes, distortion, evict_distortion, zipf_offset)
        spare = budget - sum(p * b for p, b in zip(pages, page_bytes, strict=True))
        slots = [[0] * num_tiers for _ in range(heads)]  # free records in the open page of each head and tier
        passed = []
        for _, i, h in order:
            if not _place(out, g, h, -i, int(current[g, h, -i]), slots[h], pages):
                passed.append((i, h))
        # Tokens that may not rise again can leave pages unused: turn those into lowest-tier pages for the next in rank.
        spare += sum(p * b for p, b in zip(pages, page_bytes, strict=True))
        pages = [spare // page_bytes[0]] + [0] * (num_tiers - 1)
        for i, h in passed:
            _place(out, g, h, -i, int(current[g, h, -i]), slots[h], pages)
    return out


def _place(out: torch.Tensor, g: int, h: int, i: int, current: int, slots: list[int], pages: list[int]) -> bool:
    """Highest tier not above the token's present one that still has room; opens a page where the head's is full."""
    for t in range(min(current, len(pages) - 1), -1, -1):
        if slots[t] == 0 and pages[t] > 0:
            pages[t] -= 1
            slots[t] = PAGE_SIZE
        if slots[t] > 0:
            slots[t] -= 1
            out[g, h, i] = t
            return True
    return False
