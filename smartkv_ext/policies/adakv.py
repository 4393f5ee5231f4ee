"""adakv: the heads of a layer share one budget, whatever the score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .base import Policy
from .delegate import Delegating
from .registry import get_policy


@dataclass(frozen=True)
class AdaKV(Delegating):
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
        self._ask_for(base)
        object.__setattr__(self, "compares_heads", True)
        object.__setattr__(self, "head_floor", self.floor)

    @property
    def _inner(self) -> Policy:
        assert isinstance(self.base, Policy), "made one in __post_init__"
        return self.base

    @property
    def title(self) -> str:
        return f"{self.name}({self._inner.title})"

    def for_model(self, config: Any) -> AdaKV:
        return replace(self, base=self._inner.for_model(config))
