"""Policies: which tokens matter. One score per token and KV head; the byte budget does the rest."""

from __future__ import annotations

from .adakv import AdaKV
from .attention import TOVA, PyramidKV, SnapKV
from .auto import Auto
from .base import Policy, RecordView, TokenView
from .cumulative import H2O, Evolved, Hybrid, LayerAware
from .expected import ExpectedAttention
from .gate import Gate, GateHybrid
from .keys import KeyDiff, Knorm
from .map import PolicyMap
from .position import Full, Random, SlidingWindow, StreamingLLM
from .registry import POLICIES, get_policy
from .union import Union

POLICIES |= {
    policy.name: policy
    for policy in (
        Full, SlidingWindow, StreamingLLM, Knorm, KeyDiff, SnapKV, PyramidKV, TOVA, H2O, ExpectedAttention, Hybrid,
        LayerAware, Evolved, Gate, GateHybrid, AdaKV, Union, PolicyMap, Random, Auto,
    )
}  # fmt: skip

__all__ = ["POLICIES", "Policy", "RecordView", "TokenView", "get_policy"]
