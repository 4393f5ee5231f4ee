"""A policy that lets another one do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from smartkv_ext.gates import Gates

from .base import Policy, RecordView, TokenView

ASKS = (
    "prefill_queries",
    "decode_queries",
    "accumulates",
    "recent_queries",
    "needs_pre_rope_keys",
    "scores_keys",
    "shared_bytes",
    "keeps_sinks",
)  # what a policy asks of the cache


class Delegating(Policy):
    """Every call goes to ``_inner``. A subclass says who that is, and calls ``_ask_for`` when it changes."""

    @property
    def _inner(self) -> Policy:
        raise NotImplementedError

    def _ask_for(self, inner: Policy) -> None:
        for name in ASKS:
            object.__setattr__(self, name, getattr(inner, name))

    def score(self, view: TokenView) -> torch.Tensor:
        return self._inner.score(view)

    def score_keys(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], first_layer: int, head_offset: int
    ) -> torch.Tensor:
        return self._inner.score_keys(keys, values, first_layer, head_offset)

    @property
    def own_gates(self) -> Gates | None:
        return self._inner.own_gates

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        self._inner.check_keys(sketch)

    def refresh(self, records: RecordView) -> torch.Tensor:
        return self._inner.refresh(records)

    def carried(
        self, scores: torch.Tensor, received: torch.Tensor | None, layer_idx: int, head_offset: int,
        key_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        return self._inner.carried(scores, received, layer_idx, head_offset, key_scores)

    def crop(self, state: dict[str, torch.Tensor], length: int) -> None:
        self._inner.crop(state, length)

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        return self._inner.layer_share(layer_idx, num_layers, num_kv_heads)

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        self._inner.check(num_layers, num_kv_heads)
