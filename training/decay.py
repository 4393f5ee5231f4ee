"""How attention falls with distance, for each KV head: the exponent r of p(d) ~ ((d + 64) / 64) ** -r.

From what collect stored: the attention that early tokens of a piece receive from queries 33 to 256 tokens later, and
from those still later. Their ratio, averaged over tokens, decides r.
"""

from __future__ import annotations

from pathlib import Path

import torch

from smartkv_ext.policies.gate import NEAR

from .collect import SINKS
from .dataset import TokenSet

NEARBY, DISTANT = 32, 256  # horizons of training.targets
MOST = 4.0


def measure_decay(folder: Path) -> torch.Tensor:
    """(heads of all layers,) float32 exponents in [0, MOST], from the shards of the train split."""
    tokens = TokenSet.load(folder, "train", [f"future_sum_{NEARBY}", f"future_sum_{DISTANT}"])
    early = (tokens.positions >= SINKS) & (tokens.positions < max(tokens.length // 4, SINKS + 1))
    distant = tokens.targets[f"future_sum_{DISTANT}"][:, early].exp().mean(1)
    nearby = tokens.targets[f"future_sum_{NEARBY}"][:, early].exp().mean(1) - distant
    reach = int(tokens.length - tokens.positions[early].float().mean())
    if reach <= DISTANT + NEARBY:
        return torch.ones(len(tokens.inputs))  # pieces too short to tell
    return torch.tensor([_exponent(x, reach) for x in (distant / nearby.clamp(min=1e-9)).tolist()])


def _exponent(ratio: float, reach: int) -> float:
    """The r at which distances up to ``reach`` give the ``ratio`` of distant to nearby attention; by bisection."""
    distance = torch.arange(reach)
    low, high = 0.0, MOST
    for _ in range(30):
        r = (low + high) / 2
        p = ((distance + NEAR) / NEAR) ** -r
        low, high = (r, high) if p[DISTANT:].sum() / p[NEARBY:DISTANT].sum() > ratio else (low, r)
    return (low + high) / 2
