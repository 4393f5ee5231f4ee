"""Learned gates: a tiny MLP per layer and KV head that says from a token's pre-RoPE key whether it will matter."""

from .gates import KINDS, Gates
from .lookup import shipped_gates
from .model import ModelFacts, key_sketch

__all__ = ["KINDS", "Gates", "ModelFacts", "key_sketch", "shipped_gates"]
