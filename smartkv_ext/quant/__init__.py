"""Tiers, their true cost in bytes, and the byte budget that they share."""

from .budget import Budget, parse_budget
from .spec import DEFAULT_TIERS, TIER_LOSS, QuantSpec

__all__ = ["DEFAULT_TIERS", "TIER_LOSS", "Budget", "QuantSpec", "parse_budget"]
