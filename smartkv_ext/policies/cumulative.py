"""Policies over attention from all past queries: h2o, hybrid, layer_aware, evolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .expression import Expression, parse
from .features import FEATURES, RECENT_QUERIES, FeaturePolicy, TokenFeatures, protect


@dataclass(frozen=True)
class H2O(FeaturePolicy):
    """Heavy hitters: ``score_i = sum_q p(q -> i)`` over all queries so far (Zhang et al. 2023, section 4).

    The paper keeps as many recent tokens as heavy hitters. Here the cache's window is the recent part, and the rest of
    the budget goes to heavy hitters.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "attention from all queries so far"
    source: ClassVar[str] = "Zhang et al. 2023, H2O: Heavy-Hitter Oracle for Efficient Generative Inference"

    def score_features(self, features: TokenFeatures) -> torch.Tensor:
        return features.cumulative


@dataclass(frozen=True)
class Hybrid(FeaturePolicy):
    """``0.6 recent + 0.4 cumulative ((position + 1) / seq_len) ** 0.3 + bonus max(0, 1 - age / 128)``.

    Sinks and the newest four tokens stay. The size of the bonus was never published: 1.0 has the least error on the
    TRAIN split of bench.synthetic_eviction, among 0 to 2.
    """

    name: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = "recent and cumulative attention, with a recency bonus"
    source: ClassVar[str] = "the baseline of layer_aware"
    recent_queries: ClassVar[int] = RECENT_QUERIES
    bonus: float = 1.0

    def score_features(self, features: TokenFeatures) -> torch.Tensor:
        assert features.recent is not None, "the policy asks for recent attention"
        fresh = (1 - features.age / 128).clamp(min=0)
        weighted = features.cumulative * features.relative**0.3
        return protect(features, 0.6 * features.recent + 0.4 * weighted + self.bonus * fresh)


@dataclass(frozen=True)
class LayerAware(FeaturePolicy):
    """Hybrid with weights that move with depth, r = layer_idx / num_layers:

    ``(0.7 - 0.2 r) recent + (0.3 + 0.2 r) cumulative ((position + 1) / seq_len) ** (0.25 + 0.1 r)
    + (0.15 + 0.1 r) max(0, 1 - age / 128) - 0.1 min(key_norm, 2)``

    Sinks stay, and the newest four tokens. The four ``*_term`` switches leave a component out, for ablations:
    ``layer_term`` (r = 0), ``position_term`` (exponent 0), ``recency_term`` and ``norm_term``.
    """

    name: ClassVar[str] = "layer_aware"
    summary: ClassVar[str] = "hybrid with weights that move with depth"
    source: ClassVar[str] = "an evolved scorer: docs/design/policies.md"
    recent_queries: ClassVar[int] = RECENT_QUERIES
    layer_term: bool = True
    position_term: bool = True
    recency_term: bool = True
    norm_term: bool = True

    def score_features(self, features: TokenFeatures) -> torch.Tensor:
        assert features.recent is not None, "the policy asks for recent attention"
        r = features.layer if self.layer_term else 0.0
        cumulative = (0.3 + 0.2 * r) * features.cumulative
        if self.position_term:
            cumulative = cumulative * features.relative ** (0.25 + 0.1 * r)
        score = (0.7 - 0.2 * r) * features.recent + cumulative
        if self.recency_term:
            score = score + (0.15 + 0.1 * r) * (1 - features.age / 128).clamp(min=0)
        if self.norm_term:
            score = score - 0.1 * features.key_norm().clamp(max=2)
        return protect(features, score)


@dataclass(frozen=True)
class Evolved(FeaturePolicy):
    """The score is an expression over token features (see ``Expression``), such as training.evolve finds.

    Features: position, age and seq_len (tokens), recent and cumulative (attention), key_norm, layer (0 to 1), sink.
    Sinks and the newest four tokens stay. The default came out of a search on traces of SmolLM2 (docs/LOG.md).
    """

    name: ClassVar[str] = "evolved"
    summary: ClassVar[str] = "any expression over token features"
    source: ClassVar[str] = "training/evolve.py"
    expression: str = "recent * (0.6 + cumulative * ((position + 1) / seq_len + 0.258))"

    def __post_init__(self) -> None:
        expression = self._expression
        object.__setattr__(self, "recent_queries", RECENT_QUERIES if expression.uses("recent") else 0)

    @property
    def _expression(self) -> Expression:
        return parse(self.expression, FEATURES)

    def score_features(self, features: TokenFeatures) -> torch.Tensor:
        expression = self._expression
        values = {name: features.named(name) for name in FEATURES if expression.uses(name)}
        return protect(features, expression(values))
