"""Which model gates belong to: facts of its config, and a sketch of its key projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

SKETCH_SIZE = 8  # numbers per layer
SKETCH_WEIGHTS = 1 << 14  # of a layer's key projection, the first ones
MIN_COSINE = 0.8  # of two sketches: another dtype or a fine-tuned model stays above, an unrelated one lies near 0


@dataclass(frozen=True)
class ModelFacts:
    """What of a config decides a model's shape. The model type is left out: SmolLM2 is a Llama and a Qwen2 model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float | None

    @classmethod
    def from_config(cls, config: Any) -> ModelFacts:
        """Read a transformers config (the text part of a multimodal one)."""
        config = config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        theta = rope.get("rope_theta")
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rope_theta=None if theta is None else float(theta),
        )

    @classmethod
    def from_dict(cls, facts: Any) -> ModelFacts:
        """What ``to_dict`` gave. Raises ValueError for anything else."""
        names = {f.name for f in fields(cls)}
        if not isinstance(facts, dict) or set(facts) != names:
            raise ValueError(f"the model's facts must be {', '.join(sorted(names))}; got {facts!r}")
        return cls(**facts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def difference(self, other: ModelFacts) -> str:
        """ "hidden_size 576, not 1536; ..." of what differs; empty if nothing does."""
        mine, theirs = asdict(self), asdict(other)
        return "; ".join(f"{name} {theirs[name]}, not {mine[name]}" for name in mine if mine[name] != theirs[name])


def key_sketch(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """(layers, SKETCH_SIZE) float32: key projection weights under fixed random signs, each layer of unit length.

    weights: per layer (num_kv_heads * head_dim, hidden_size), floating point.
    """
    rows = []
    for weight in weights:
        flat = weight.detach().flatten()[:SKETCH_WEIGHTS].float().cpu()
        sums = _signs(flat.numel()) @ flat
        rows.append(sums / sums.norm().clamp(min=1e-12))
    return torch.stack(rows)


def sketch_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two sketches, mean over layers; 0 if their shapes differ."""
    return 0.0 if a.shape != b.shape else float((a * b).sum(-1).mean())


def _signs(n: int) -> torch.Tensor:
    """(SKETCH_SIZE, n) of +1 and -1 that no library version changes: bits of a multiplicative hash."""
    i = torch.arange(n, dtype=torch.int64)
    x = (i + 1) * 2654435761 % (1 << 32)
    x = (x ^ (x >> 15)) * 2246822519 % (1 << 32)
    x = x ^ (x >> 13)
    return torch.stack([(x >> (8 + bit)) % 2 for bit in range(SKETCH_SIZE)]).float() * 2 - 1
