"""Orthonormal Hadamard rotation of a head: spreads outlier channels so that one scale per token is enough.

head_dim = m * 2**p with m in {1, 12, 20}: 64, 128, 256 are pure Sylvester matrices; 96 = 12 * 8 and 80 = 20 * 4 are the
Kronecker product of a Paley-I matrix of order 12 or 20 with a Sylvester matrix, so every output still mixes *all*
channels.
"""

from __future__ import annotations

from functools import cache

import torch

ORDER = {64: (1, 64), 80: (20, 4), 96: (12, 8), 128: (1, 128), 256: (1, 256)}


@cache
def paley(order: int) -> torch.Tensor:
    """Paley-I Hadamard matrix of order q + 1, q prime and 3 mod 4: I + [[0, 1], [-1, chi(i - j)]]."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float32)
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    matrix = torch.eye(order, dtype=torch.float32)
    matrix[0, 1:] += 1
    matrix[1:, 0] -= 1
    for i in range(q):
        for j in range(q):
            if i != j:
                matrix[i + 1, j + 1] += 1 if (i - j) % q in squares else -1
    return matrix


def rotate(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """x (..., head_dim) -> H x, or H^T x. Computed in float32: butterflies first, then the order-m block, then
    1/sqrt(d)."""
    head_dim = x.shape[-1]
    if head_dim not in ORDER:
        raise ValueError(f"head_dim must be one of {', '.join(map(str, ORDER))}; got {head_dim}")
    m, n = ORDER[head_dim]
    y = x.float().unflatten(-1, (m, n))
    h = 1
    while h < n:
        y = y.unflatten(-1, (n // (2 * h), 2, h))
        a, b = y[..., 0, :], y[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        h *= 2
    if m > 1:
        matrix = paley(m).to(y)
        y = torch.einsum("ij,...jn->...in", matrix.T if inverse else matrix, y)
    out: torch.Tensor = y.flatten(-2) * head_dim**-0.5
    return out
