"""Tiers, their true cost in bytes, and the byte budget that they share."""

from .budget import Budget, parse_budget
from .spec import TIER_LOSS, QuantSpec, default_tiers

__all__ = ["TIER_LOSS", "Budget", "QuantSpec", "default_tiers", "parse_budget"]
