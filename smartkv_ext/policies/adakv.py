"""adakv: the heads of a layer share one budget, whatever the score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .base import Policy, RecordView, TokenView
from .registry import get_policy

ASKS = (
    "prefill_queries",
    "decode_queries",
    "accumulates",
    "recent_queries",
    "needs_pre_rope_keys",
    "scores_keys",
    "shared_bytes",
    "keeps_sinks",
)


@dataclass(frozen=True)
class AdaKV(Policy):
    """The tokens with the highest ``base`` scores over all heads of a layer stay (Feng et al. 2024, algorithm 1).

    Every head first keeps its best ``floor * B / H`` tokens (the paper's safeguard against starved heads); the rest of
    the layer's budget B goes to the highest scores wherever they are. Tokens count as bytes: the floor is what that
    share of an even split would hold at the lowest tier.

    Policies that say so (``compares_heads``) share a layer's budget by themselves, with floor 0; this one does so for
    any score, and adds the floor.

    Args:
        base: a policy, its name, or its specification.
        floor: in [0, 1]; the paper's alpha.
    """

    name: ClassVar[str] = "adakv"
    summary: ClassVar[str] = "any policy's score (snapkv), one budget for all heads of a layer"
    source: ClassVar[str] = "Feng et al. 2024, Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation"
    base: str | Policy | Mapping[str, Any] = "snapkv"
    floor: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1]; got {self.floor}")
        base = get_policy(self.base)
        if not base.evicts:
            raise ValueError(f"base must be a policy that evicts; got {base.name!r}")
        object.__setattr__(self, "base", base)
        for name in ASKS:
            object.__setattr__(self, name, getattr(base, name))
        object.__setattr__(self, "compares_heads", True)
        object.__setattr__(self, "head_floor", self.floor)

    @property
    def _base(self) -> Policy:
        assert isinstance(self.base, Policy), "made one in __post_init__"
        return self.base

    def score(self, view: TokenView) -> torch.Tensor:
        return self._base.score(view)

    def score_keys(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], first_layer: int, head_offset: int
    ) -> torch.Tensor:
        return self._base.score_keys(keys, values, first_layer, head_offset)

    def for_model(self, config: Any) -> AdaKV:
        return replace(self, base=self._base.for_model(config))

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        self._base.check_keys(sketch)

    def refresh(self, records: RecordView) -> torch.Tensor:
        return self._base.refresh(records)

    def carried(
        self, scores: torch.Tensor, received: torch.Tensor | None, layer_idx: int, head_offset: int,
        key_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        return self._base.carried(scores, received, layer_idx, head_offset, key_scores)

    def crop(self, state: dict[str, torch.Tensor], length: int) -> None:
        self._base.crop(state, length)

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        return self._base.layer_share(layer_idx, num_layers, num_kv_heads)

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        self._base.check(num_layers, num_kv_heads)
