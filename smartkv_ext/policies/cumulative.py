"""Policies over attention from all past queries: h2o, hybrid, layer_aware, evolved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from smartkv_ext.gates import Gates

from .expression import Expression, parse
from .features import FEATURES, GATE, RECENT_QUERIES, FeaturePolicy, TokenFeatures, carries_one, protect
from .gate import Gate


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

    Features: position, age and seq_len (tokens), recent and cumulative (attention), key_norm, layer (0 to 1), sink; and
    gate, the score of the model's learned gates, in expressions without cumulative: a packed record carries one of the
    two. Sinks and the newest four tokens stay. The default came out of a search on traces of SmolLM2 (docs/LOG.md).

    Args:
        expression: text.
        gates: for the feature gate, as the policy ``gate`` takes them; None: those that come with the package.
    """

    name: ClassVar[str] = "evolved"
    summary: ClassVar[str] = "any expression over token features"
    source: ClassVar[str] = "training/evolve.py"
    expression: str = "recent * (0.6 + cumulative * ((position + 1) / seq_len + 0.258))"
    gates: str | Gates | None = None
    _gate: Gate | None = field(init=False, compare=False, repr=False, default=None)

    def __post_init__(self) -> None:
        expression = self._expression
        if not carries_one(expression):
            raise ValueError(
                f"expression may use gate or cumulative, as records carry one number; got both in {expression.text!r}"
            )
        if self.gates is not None and not expression.uses(GATE):
            raise ValueError(f"gates serve the feature gate, which the expression does not use: {expression.text!r}")
        object.__setattr__(self, "recent_queries", RECENT_QUERIES if expression.uses("recent") else 0)
        if expression.uses(GATE):
            self._bind(Gate(gates=self.gates))

    def _bind(self, gate: Gate) -> None:
        object.__setattr__(self, "_gate", gate)
        object.__setattr__(self, "scores_keys", True)
        object.__setattr__(self, "shared_bytes", gate.shared_bytes)

    @property
    def _expression(self) -> Expression:
        return parse(self.expression, (*FEATURES, GATE))

    def score_features(self, features: TokenFeatures) -> torch.Tensor:
        expression = self._expression
        values = {name: features.named(name) for name in expression.names if expression.uses(name)}
        return protect(features, expression(values))

    @property
    def own_gates(self) -> Gates | None:
        return None if self._gate is None else self._gate.own_gates

    def for_model(self, config: Any) -> Evolved:
        if self._gate is None:
            return self
        made = copy.copy(self)
        made._bind(self._gate.for_model(config))
        return made

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        if self._gate is not None:
            self._gate.check_keys(sketch)

    def score_keys(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], first_layer: int, head_offset: int
    ) -> torch.Tensor:
        assert self._gate is not None, "only expressions that use the gate score keys"
        return self._gate.score_keys(keys, values, first_layer, head_offset)

    def carried(
        self, scores: torch.Tensor, received: torch.Tensor | None, layer_idx: int, head_offset: int,
        key_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        carried = super().carried if self._gate is None else self._gate.carried
        return carried(scores, received, layer_idx, head_offset, key_scores)

    def spec(self) -> dict[str, Any]:
        gates = {} if self._gate is None else {"gates": self._gate.spec()["gates"]}
        return {"name": self.name, "expression": self.expression, **gates}
