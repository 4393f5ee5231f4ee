"""Learned gates as policies: gate, gate_hybrid."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from smartkv_ext.gates import Gates, ModelFacts, shipped_gates

from .base import Policy, RecordView, TokenView

NEAR = 64  # tokens: attention of younger ones is taken not to have fallen yet


@dataclass(frozen=True)
class Gate(Policy):
    """A learned gate's score g, less what its head forgets with age: ``g - recency decay ln((age + 64) / 64)``.

    Gates predict the logarithm of the attention that a token's content draws, wherever it stands; ``decay`` is measured
    for each head and comes with the gates (1 if they have none). The rank decides under the byte budget; with one of
    ``threshold``, ``probability`` and ``retention``, tokens whose g is below it are evicted whatever the budget.

    Each token is scored once, when it comes: 4 bytes beside its key until it is packed, instead of its pre-RoPE key.
    All heads predict the same quantity, so they compete.

    Args:
        gates: a folder, a hub id, or ``Gates``; None: those that come with the package for the model at hand.
        threshold: least score.
        probability: the same, as the calibrated probability that the token is attended to much later.
        retention: the same, as the share of tokens of all layers and heads that reach it on held-out text.
        recency: 0: content alone, as for a question that may be about any part; 1: as attention falls in the model.
    """

    name: ClassVar[str] = "gate"
    summary: ClassVar[str] = "a learned gate on the pre-RoPE key"
    source: ClassVar[str] = "training/; the target is KVzip's (Kim et al. 2025), the idea of a surrogate KVzap's"
    compares_heads: ClassVar[bool] = True
    scores_keys: ClassVar[bool] = True
    gates: str | Gates | None = None
    threshold: float | None = None
    probability: float | None = None
    retention: float | None = None
    recency: float = 1.0
    _bound: Gates | None = field(init=False, compare=False, repr=False, default=None)

    def __post_init__(self) -> None:
        given = [name for name in ("threshold", "probability", "retention") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of threshold, probability and retention; got {' and '.join(given)}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("threshold must be a number; got nan")
        if not 0 <= self.recency < float("inf"):
            raise ValueError(f"recency must be a number of at least 0; got {self.recency}")
        if self.gates is not None:
            gates = self.gates if isinstance(self.gates, Gates) else Gates.from_pretrained(self.gates)
            self._bind(gates)

    def _bind(self, gates: Gates) -> None:
        object.__setattr__(self, "_bound", gates)
        object.__setattr__(self, "shared_bytes", gates.num_bytes)
        self._least()  # complains now, not in the middle of a prefill

    @property
    def _gates(self) -> Gates:
        if self._bound is None:
            raise RuntimeError("the gate policy has no gates yet: a cache binds them to its model")
        return self._bound

    @property
    def own_gates(self) -> Gates | None:
        return self._bound

    def _least(self) -> torch.Tensor | float:
        """The least score, or (num_layers, num_kv_heads) of them."""
        if self.probability is not None:
            return self._gates.probability_score(self.probability)
        if self.retention is not None:
            return self._gates.threshold(self.retention)
        return -torch.inf if self.threshold is None else self.threshold

    def _too_low(self, view: TokenView, scores: torch.Tensor) -> torch.Tensor:
        least = self._least()
        if isinstance(least, torch.Tensor):
            mine = least[view.layer_idx, view.head_offset : view.head_offset + scores.shape[1]]
            least = mine[:, None].to(scores.device)
        return scores < least

    def for_model(self, config: Any) -> Gate:
        facts = ModelFacts.from_config(config)
        gates = shipped_gates(facts) if self._bound is None else self._bound
        gates.check_model(facts)
        made = copy.copy(self)  # replace() would read the file again
        made._bind(gates)
        return made

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        if self._gates.sketch is not None and (found := sketch()) is not None:
            self._gates.check_sketch(found)

    def score_keys(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], first_layer: int, head_offset: int
    ) -> torch.Tensor:
        return self._gates.score(keys, values, first_layer, head_offset)

    def score(self, view: TokenView) -> torch.Tensor:
        assert view.key_scores is not None, "the policy scores keys, so the cache keeps what it said"
        scores = self._aged(view.key_scores, view.seen - view.positions[:, None], view.layer_idx, view.head_offset)
        return scores.masked_fill(self._too_low(view, view.key_scores), -torch.inf)

    def refresh(self, records: RecordView) -> torch.Tensor:
        return self._aged(records.stored, records.seen - records.positions, records.layer_idx, records.head_offset)

    def _aged(self, scores: torch.Tensor, age: torch.Tensor, layer_idx: int, head_offset: int) -> torch.Tensor:
        fall = torch.log1p(age.clamp(min=0) / NEAR)
        if self._bound is None or self._bound.decay is None:
            return scores - self.recency * fall
        decay = self._bound.decay[layer_idx, head_offset : head_offset + scores.shape[1]]
        return scores - self.recency * decay[:, None].to(scores.device) * fall

    def carried(
        self, scores: torch.Tensor, received: torch.Tensor | None, layer_idx: int, head_offset: int,
        key_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert key_scores is not None, "the policy scores keys, so the cache keeps what it said"
        return key_scores

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        shares = self._gates.layer_shares
        return 1.0 if shares is None else float(shares[layer_idx])

    def spec(self) -> dict[str, Any]:
        if isinstance(self.gates, Gates) and self.gates.source is None:
            raise ValueError("gates that were never saved cannot be named: call save_pretrained and load them again")
        gates = self.gates.source if isinstance(self.gates, Gates) else self.gates
        options = {name: getattr(self, name) for name in ("threshold", "probability", "retention", "recency")}
        return {"name": self.name, "gates": gates, **options}


@dataclass(frozen=True)
class GateHybrid(Gate):
    """Layers do different work: the first ``local_layers`` keep ``local_window`` recent tokens, ``gate_layers`` follow
    their gates, and the others keep ``recent`` tokens; sinks stay everywhere. The byte budget of pages goes to the gate
    layers. The cache's window is kept in any case, so a smaller ``recent`` changes nothing.

    Args:
        gate_layers: None: all but the first ``local_layers``.
    """

    name: ClassVar[str] = "gate_hybrid"
    summary: ClassVar[str] = "gates in some layers, recent tokens in the others"
    source: ClassVar[str] = "docs/design/gates.md"
    local_layers: int = 5
    local_window: int = 64
    recent: int = 128
    gate_layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("local_layers", 0), ("local_window", 1), ("recent", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.gate_layers is not None:
            object.__setattr__(self, "gate_layers", tuple(self.gate_layers))

    def _follows(self, layer_idx: int) -> bool:
        """Whether a layer follows its gates."""
        return layer_idx >= self.local_layers if self.gate_layers is None else layer_idx in self.gate_layers

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        if not any(self._follows(i) for i in range(num_layers)):
            raise ValueError(f"some layer of {num_layers} must follow its gates; got none")
        unknown = sorted(set(self.gate_layers or ()) - set(range(num_layers)))
        if unknown:
            raise ValueError(f"gate_layers must be layers from 0 to {num_layers - 1}; got {unknown}")

    def score(self, view: TokenView) -> torch.Tensor:
        if self._follows(view.layer_idx):
            return super().score(view)
        recent = self.local_window if view.layer_idx < self.local_layers else self.recent
        positions = view.positions[:, None].float().expand(view.keys.shape[:3])
        return positions.masked_fill(positions < view.seen - recent, -torch.inf)

    def refresh(self, records: RecordView) -> torch.Tensor:
        if self._follows(records.layer_idx):
            return super().refresh(records)
        return records.positions.float()  # nothing is packed but what an unlimited budget leaves

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        shares = [
            Gate.layer_share(self, i, num_layers, num_kv_heads) if self._follows(i) else 0.0 for i in range(num_layers)
        ]
        if sum(shares) == 0:  # the gates give all to layers that do not follow them
            shares = [float(self._follows(i)) for i in range(num_layers)]
        return shares[layer_idx] * num_layers / sum(shares)

    def spec(self) -> dict[str, Any]:
        layers = None if self.gate_layers is None else list(self.gate_layers)
        mine = {"local_layers": self.local_layers, "local_window": self.local_window, "recent": self.recent}
        return super().spec() | mine | {"gate_layers": layers}
