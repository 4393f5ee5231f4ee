"""Tiers, their true cost in bytes, and the byte budget that they share."""

from .budget import Budget, parse_budget
from .spec import QuantSpec

__all__ = ["Budget", "QuantSpec", "parse_budget"]
