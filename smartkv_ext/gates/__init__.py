"""Learned gates: a tiny MLP per layer and KV head that says from a token's pre-RoPE key whether it will matter."""

from .gates import KINDS, Gates
from .lookup import find_shipped_gates, shipped_gates
from .model import ModelFacts, key_sketch

__all__ = ["KINDS", "Gates", "ModelFacts", "find_shipped_gates", "key_sketch", "shipped_gates"]
