"""union: what several policies want, each with its share of the places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from smartkv_ext.gates import Gates

from .base import Policy, TokenView
from .registry import get_policy

Part = str | Policy | Mapping[str, Any]


@dataclass(frozen=True)
class Union(Policy):
    """score = -min over parts of place / weight: the tokens that any part ranks high (docs/design/quality.md).

    ``place`` in [0, 1) is a token's rank in a part's order, over all heads of the layer where the part's scores compare
    across heads, else in its head. Ranks need no common scale, so a score of keys and one of attention can share a
    budget: one keeps what is unlike the rest, and may be asked for, the other what is attended to now.

    Records keep the score that they were packed with. One part may have gates.

    Args:
        parts: policies that evict: names, specifications or instances.
        weights: shares of the places, one per part; none: all the same.
    """

    name: ClassVar[str] = "union"
    summary: ClassVar[str] = "what any of several policies ranks high (keydiff and expected_attention)"
    source: ClassVar[str] = "docs/design/quality.md"
    compares_heads: ClassVar[bool] = True
    parts: Sequence[Part] = ("keydiff", "expected_attention")
    weights: Sequence[float] = ()

    def __post_init__(self) -> None:
        parts = tuple(get_policy(part) for part in self.parts)
        weights = tuple(float(w) for w in self.weights) or (1.0,) * len(parts)
        if len(parts) < 2:
            raise ValueError(f"parts must name at least two policies; got {len(parts)}")
        if len(weights) != len(parts) or min(weights) <= 0:
            raise ValueError(f"weights must be {len(parts)} positive numbers, one per part; got {list(weights)}")
        for part in parts:
            if not part.evicts or part.accumulates:
                raise ValueError(f"parts must be policies that evict and keep their scores; got {part.name!r}")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "weights", weights)
        for name in ("prefill_queries", "decode_queries"):
            object.__setattr__(self, name, max(getattr(part, name) for part in parts))
        for name in ("needs_pre_rope_keys", "scores_keys"):
            object.__setattr__(self, name, any(getattr(part, name) for part in parts))
        if sum(part.scores_keys for part in parts) > 1:
            raise ValueError("parts may hold one policy with gates; got more")
        object.__setattr__(self, "shared_bytes", sum(part.shared_bytes for part in parts))

    @property
    def _policies(self) -> tuple[Policy, ...]:
        return tuple(part for part in self.parts if isinstance(part, Policy))  # made so in __post_init__

    def score(self, view: TokenView) -> torch.Tensor:
        best: torch.Tensor | None = None
        for part, weight in zip(self._policies, self.weights, strict=True):
            scores = part.score(view).float().masked_fill((view.positions < 0)[:, None], -torch.inf)
            place = _places(scores.nan_to_num(nan=-torch.inf), part.compares_heads) / weight
            best = place if best is None else torch.minimum(best, place)
        assert best is not None
        return -best

    @property
    def own_gates(self) -> Gates | None:
        return next((part.own_gates for part in self._policies if part.own_gates), None)

    def for_model(self, config: Any) -> Union:
        return replace(self, parts=tuple(part.for_model(config) for part in self._policies))

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        for part in self._policies:
            part.check_keys(sketch)

    def score_keys(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], first_layer: int, head_offset: int
    ) -> torch.Tensor:
        gate = next(part for part in self._policies if part.scores_keys)
        return gate.score_keys(keys, values, first_layer, head_offset)

    def crop(self, state: dict[str, torch.Tensor], length: int) -> None:
        for part in self._policies:
            part.crop(state, length)

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        for part in self._policies:
            part.check(num_layers, num_kv_heads)

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        """What the part with gates says: how much a layer needs is measured with them, and holds for any policy."""
        shares = [p.layer_share(layer_idx, num_layers, num_kv_heads) for p in self._policies if p.scores_keys]
        return shares[0] if shares else 1.0

    @property
    def title(self) -> str:
        parts = zip(self._policies, self.weights, strict=True)
        return f"{self.name}({', '.join(p.title if w == 1 else f'{w:g} {p.title}' for p, w in parts)})"

    def spec(self) -> dict[str, Any]:
        parts = [part.spec() for part in self._policies]
        return {"name": self.name, "parts": parts, "weights": list(self.weights)}


def _places(scores: torch.Tensor, across_heads: bool) -> torch.Tensor:
    """Ranks of scores (batch, num_kv_heads, n), best 0, as a share of all that are ranked together."""
    together = scores.flatten(1) if across_heads else scores
    order = together.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1).view_as(scores).float() / together.shape[-1]
