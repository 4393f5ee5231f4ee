"""What the search scores: token features and the attention to come, of all layers and documents of a split at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smartkv_ext.policies.expression import Expression
from smartkv_ext.policies.features import FEATURES, GATE, TokenFeatures

from .reconstruction import NUM_SINKS, RETENTIONS, Trace, error_curve, protected


@dataclass
class Samples:
    """``features``: by name, broadcasting to the shape of ``future`` (layers, batch, num_kv_heads, n), float32."""

    features: dict[str, torch.Tensor]
    future: torch.Tensor

    @classmethod
    def of_traces(cls, traces: Sequence[Trace]) -> Samples:
        """Features as the policies compute them; "gate" too where gates have scored the keys of all layers."""
        per_layer = [TokenFeatures.of_tokens(trace.view) for trace in traces]
        features = {}
        for name in (*FEATURES, GATE) if all(f.gate is not None for f in per_layer) else FEATURES:
            values = [torch.as_tensor(f.named(name), dtype=torch.float32) for f in per_layer]
            features[name] = torch.stack([x if x.dim() else x.view(1, 1, 1) for x in values])
        return cls(features, torch.stack([trace.future for trace in traces]))

    @property
    def names(self) -> tuple[str, ...]:
        """Features that an expression may use."""
        return tuple(sorted(self.features))

    def error(self, expression: Expression, window: int) -> float:
        """Mean reconstruction error over the retentions; every head keeps as many tokens."""
        scores = expression(self.features).expand_as(self.future)
        curve = error_curve(protected(scores, window, NUM_SINKS), self.future)
        keep = [round(r * self.future.shape[-1]) for r in RETENTIONS]
        return curve[..., keep].mean().item()

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {f"feature.{name}": x for name, x in self.features.items()} | {"future": self.future}
        save_file({name: x.contiguous() for name, x in tensors.items()}, path)

    @staticmethod
    def identity(path: Path) -> dict[str, Any]:
        """SHA-256 of a file of ``save`` and its features, without a look at any error. Raises FileNotFoundError."""
        _find(path)
        with safe_open(path, "pt") as file:
            names = sorted(name[8:] for name in file.keys() if name.startswith("feature."))  # noqa: SIM118  # no dict
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "features": names}

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read what ``save`` wrote. Raises FileNotFoundError."""
        _find(path)
        tensors = load_file(path)
        features = {name[8:]: x for name, x in tensors.items() if name.startswith("feature.")}
        return cls(features, tensors["future"])


def _find(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: bench.real_eviction --save-samples writes it")
