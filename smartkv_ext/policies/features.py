"""What scorers of received attention see of a token, and how records keep it while they are packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Policy, RecordView, TokenView
from .expression import Expression

NUM_SINKS = 4  # tokens that the formulas below call sinks
NEWEST = 4  # tokens that they keep for being new
RECENT_QUERIES = 32
FEATURES = ("position", "age", "seq_len", "recent", "cumulative", "key_norm", "layer", "sink")
GATE = "gate"  # a further feature, where a model has learned gates


@dataclass(frozen=True)
class TokenFeatures:
    """Features of tokens, tensors that broadcast to (..., num_kv_heads, n), float32.

    Attention is in the model's own probabilities, summed over queries and over the query group of a KV head. In a
    padded batch position and length are those of the sequence without its padding.
    """

    position: torch.Tensor  # index in its own sequence
    seq_len: torch.Tensor  # tokens of the sequence so far
    recent: torch.Tensor | None  # attention from the newest 32 queries
    cumulative: torch.Tensor  # attention from all queries since the token came, its own included
    key_norm: Callable[[], torch.Tensor]  # L2 norm of the key; for packed records it costs a dequantisation
    layer: float | torch.Tensor  # layer_idx / num_layers
    gate: torch.Tensor | None  # what learned gates say of the token; None unless the policy scores keys

    @property
    def age(self) -> torch.Tensor:
        """Newest position - position."""
        return self.seq_len - 1 - self.position

    @property
    def relative(self) -> torch.Tensor:
        """(position + 1) / seq_len, in (0, 1]."""
        return (self.position.clamp(min=0) + 1) / self.seq_len

    @property
    def sink(self) -> torch.Tensor:
        """1 for the first four tokens, else 0."""
        return (self.position < NUM_SINKS).float()

    def named(self, name: str) -> float | torch.Tensor:
        """The feature called ``name``, one of FEATURES or GATE."""
        value = getattr(self, name)
        return value() if name == "key_norm" else value  # type: ignore[no-any-return]

    @classmethod
    def of_tokens(cls, view: TokenView) -> TokenFeatures:
        assert view.received is not None, "the policy accumulates, so the cache measures"
        return cls(
            *_places(view.positions[:, None], view.seen, view.row_tokens), view.recent, view.received,
            lambda: torch.linalg.vector_norm(view.keys.float(), dim=-1), view.layer_idx / view.num_layers,
            view.key_scores,
        )  # fmt: skip

    @classmethod
    def of_records(cls, records: RecordView) -> TokenFeatures:
        """``gate`` and ``cumulative`` are for policies whose records carry the one or the other (``carries_one``)."""
        assert records.received is not None, "the policy accumulates, so the cache measures"
        return cls(
            *_places(records.positions, records.seen, records.row_tokens), records.recent, records.received,
            records.key_norms, records.layer_idx / records.num_layers, records.stored,
        )  # fmt: skip


def carries_one(expression: Expression) -> bool:
    """Whether packed records can serve an expression: they carry cumulative attention or the gate's score, not both."""
    return not (expression.uses(GATE) and expression.uses("cumulative"))


def _places(positions: torch.Tensor, seen: int, row_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index within the row's own tokens, and how many those are; padding lies in front."""
    length = row_tokens[:, None, None].float()
    return positions.float() - (seen - length), length


@dataclass(frozen=True)
class FeaturePolicy(Policy):
    """Base of policies whose score is one formula over TokenFeatures, the same for packed records and for new tokens.

    A record carries its cumulative attention, so the formula is evaluated afresh at every packing step: ages, recent
    attention and sequence lengths are those of the moment. Carried as a bfloat16, growth of less than 0.2 % between two
    packing steps is lost.

    Sums of attention are on one scale, yet heads do not compete: an even split left a fifth less KL (docs/LOG.md).
    """

    accumulates: ClassVar[bool] = True

    def score_features(self, features: TokenFeatures) -> torch.Tensor:
        """Higher = keep; any shape that broadcasts to that of ``features.cumulative``."""
        raise NotImplementedError

    def score(self, view: TokenView) -> torch.Tensor:
        assert view.received is not None, "the policy accumulates, so the cache measures"
        return self.score_features(TokenFeatures.of_tokens(view)).expand_as(view.received)

    def refresh(self, records: RecordView) -> torch.Tensor:
        return self.score_features(TokenFeatures.of_records(records)).expand_as(records.stored)

    def carried(
        self, scores: torch.Tensor, received: torch.Tensor | None, layer_idx: int, head_offset: int,
        key_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert received is not None, "the policy accumulates, so the cache measures"
        return received


def protect(features: TokenFeatures, scores: torch.Tensor) -> torch.Tensor:
    """Sinks first of all, then the newest four tokens, whatever their scores: +inf, and 1e6 - age."""
    scores = torch.where(features.age < NEWEST, 1e6 - features.age, scores)
    return torch.where(features.position < NUM_SINKS, torch.inf, scores)
