"""The one knob: how many bytes the cache may hold, everything counted."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_ACCEPTED = (
    'a fraction in (0, 1] of the full bf16 cache like 0.125, "1/8" or "12.5%", bytes like "64MB", bits per value like '
    '"4bits", or None'
)


@dataclass(frozen=True)
class Budget:
    """Either a fraction of the full bf16 cache of the tokens seen, or a fixed number of bytes, or neither: no limit."""

    fraction: float | None = None
    num_bytes: int | None = None

    def __str__(self) -> str:
        if self.num_bytes is not None:
            return f"{self.num_bytes:,} bytes"
        return "no limit" if self.fraction is None else f"{self.fraction:.4g} of the full cache"

    def limit(self, full_bytes: int) -> int | None:
        """Bytes allowed when the full bf16 cache of the same tokens takes ``full_bytes``; None: no limit."""
        if self.fraction is not None:
            return int(self.fraction * full_bytes)
        return self.num_bytes


def parse_budget(budget: float | str | Budget | None) -> Budget:
    """Read what users write. Raises ValueError (bad value) or TypeError (bad type), naming what is accepted."""
    if budget is None or isinstance(budget, Budget):
        return budget or Budget()
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"budget must be {_ACCEPTED}; got {type(budget).__name__}")
    if isinstance(budget, str):
        ratio = re.fullmatch(r"\s*([0-9]+)\s*/\s*0*([1-9][0-9]*)\s*", budget)
        if ratio and 0 < int(ratio[1]) <= int(ratio[2]):
            return Budget(fraction=int(ratio[1]) / int(ratio[2]))
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*|%)\s*", budget)
        number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "?")
        if unit in ("bit", "bits"):
            number, unit = number / 16, ""
        if unit == "%":
            number, unit = number / 100, ""
        if unit in _UNITS and number > 0:
            return Budget(num_bytes=int(number * _UNITS[unit]))
        if unit:
            raise ValueError(f"budget must be {_ACCEPTED}; got {budget!r}")
        budget = number
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be {_ACCEPTED}; got {budget!r}")
    return Budget(fraction=float(budget))
