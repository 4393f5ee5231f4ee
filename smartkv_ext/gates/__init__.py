"""Learned gates: a tiny MLP per layer and KV head that says from a token's pre-RoPE key whether it will matter."""

from .gates import KINDS, Gates
from .key_basis import KeyBasis, LayerBasis, balancing_map
from .lookup import find_shipped_gates, shipped_gates
from .model import ModelFacts, key_sketch

__all__ = [
    "KINDS", "Gates", "KeyBasis", "LayerBasis", "ModelFacts", "balancing_map", "find_shipped_gates", "key_sketch",
    "shipped_gates",
]  # fmt: skip
