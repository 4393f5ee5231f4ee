"""Reconstruction levels: small integers, so that every kernel set, integer dot products included, agrees exactly.

A quantised value is ``scale * level[code]``. "gaussian" levels are the Lloyd-Max quantiser of a unit normal
(Max, "Quantizing for minimum distortion", 1960) scaled so that the outermost level is 127 and rounded: the rounding
moves no level by more than 1 % of a standard deviation. "uniform" levels are the odd integers. 8 bits are always
uniform, level = code - 128: there the codebook gains nothing.
"""

from __future__ import annotations

from functools import cache

import torch

LEVELS = ("uniform", "gaussian")

# Positive half of the Lloyd-Max levels of N(0, 1).
_LLOYD_MAX = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}

# Mean squared error relative to the variance of a normal source, per tier. The cache weighs quant.spec.TIER_LOSS.
RELATIVE_DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497, 8: 4.0e-5, 16: 0.0}


@cache
def level_table(bits: int, levels: str) -> torch.Tensor:
    """(2**bits,) float32 of integer-valued levels, ascending."""
    if levels not in LEVELS:
        raise ValueError(f"levels must be one of {', '.join(LEVELS)}; got {levels!r}")
    if bits == 8:
        return torch.arange(256, dtype=torch.float32) - 128
    if levels == "uniform":
        return torch.arange(1 - 2**bits, 2**bits, 2, dtype=torch.float32)
    half: torch.Tensor = torch.tensor(_LLOYD_MAX[bits], dtype=torch.float64)
    half = torch.round(half * 127 / half[-1]).float()
    return torch.cat([-half.flip(0), half])


def gaussian_unit(bits: int) -> float:
    """Standard deviations per unit of level: first guess of scale = rms * gaussian_unit."""
    return _LLOYD_MAX[bits][-1] / 127
