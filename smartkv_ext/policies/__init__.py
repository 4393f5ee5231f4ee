"""Policies: which tokens matter. One score per token and KV head; the byte budget does the rest."""

from __future__ import annotations

from typing import Any

from .attention import TOVA, SnapKV
from .base import Policy, TokenView
from .keys import KeyDiff, Knorm
from .position import Full, Random, SlidingWindow, StreamingLLM

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Full, SlidingWindow, StreamingLLM, Knorm, KeyDiff, SnapKV, TOVA, Random)
}

__all__ = ["POLICIES", "Policy", "TokenView", "get_policy"]


def get_policy(policy: str | Policy, **options: Any) -> Policy:
    """An instance as it is, or a new one by name with its options.

    Raises ValueError for an unknown name, TypeError for anything else or for an option that the policy does not have.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or a Policy; got {type(policy).__name__}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(sorted(POLICIES))}; got {policy!r}")
    return POLICIES[policy](**options)
