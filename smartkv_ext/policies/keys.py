"""Policies that look at keys alone: knorm, keydiff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Policy, TokenView


@dataclass(frozen=True)
class Knorm(Policy):
    """score = -||k||: keys of small norm tend to receive high attention (Devoto et al. 2024, eq. 1)."""

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "keys of small norm"
    source: ClassVar[str] = "Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"

    def score(self, view: TokenView) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
        return -norm


@dataclass(frozen=True)
class KeyDiff(Policy):
    """score = -cos(k, anchor), anchor = mean of the normalised keys: distinctive keys stay (Park et al. 2025, alg. 1).

    The anchor is the mean over *all* tokens seen, kept as a running sum: state "keydiff_anchor" (batch,
    num_kv_heads, head_dim) of unit keys; "keydiff_seen" (batch,) is the position up to which it sums, since the
    window is shown again at every call.
    """

    name: ClassVar[str] = "keydiff"
    summary: ClassVar[str] = "keys that differ most from the mean key"
    source: ClassVar[str] = "Park et al. 2025, KeyDiff: Key Similarity-Based KV Cache Eviction"
    compares_heads: ClassVar[bool] = True

    def score(self, view: TokenView) -> torch.Tensor:
        valid = view.positions >= 0
        unit = F.normalize(view.keys.float().masked_fill(~valid[:, None, :, None], 0.0), dim=-1)
        seen = view.state.get("keydiff_seen", torch.full_like(view.positions[:, 0], -1))
        fresh = (view.positions > seen[:, None])[:, None, :, None]
        anchor = (unit * fresh).sum(2) + view.state.get("keydiff_anchor", 0.0)
        view.state["keydiff_anchor"] = anchor
        view.state["keydiff_seen"] = torch.maximum(seen, view.positions.amax(1))
        return -(unit * F.normalize(anchor, dim=-1)[:, :, None]).sum(-1)

    def crop(self, state: dict[str, torch.Tensor], length: int) -> None:
        # The removed keys stay in the sum, as a small part of a mean; what follows them must be counted.
        if "keydiff_seen" in state:
            state["keydiff_seen"] = state["keydiff_seen"].clamp(max=length - 1)
