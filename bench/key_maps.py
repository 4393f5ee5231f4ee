"""Linear maps of keys that let quantisation noise fall where queries are small.

Keys are stored as A k and read with A^-T q, so that scores stay. For isotropic noise as strong as the mapped keys, the
expected score error tr(A^-1 A^-T Cq) tr(A Ck A^T) is least where A^T A is the geometric mean of Cq and Ck^-1. Ck and Cq
are second moments of a head's centred keys and of its group's queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def power(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """Symmetric positive matrices (..., n, n) to a power; eigenvalues are kept away from zero."""
    values, vectors = torch.linalg.eigh(x)
    values = values.clamp(min=values.amax(-1, keepdim=True) * 1e-6) ** exponent
    out: torch.Tensor = vectors @ (values[..., None] * vectors.mT)
    return out


def moments(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (num_heads, n, head_dim), k (num_kv_heads, n, head_dim) -> (Cq, Ck), each (num_kv_heads, head_dim, head_dim)
    float64."""
    centred = k.double() - k.double().mean(1, keepdim=True)
    grouped = q.double().unflatten(0, (k.shape[0], -1)).flatten(1, 2)
    return grouped.mT @ grouped / grouped.shape[1], centred.mT @ centred / centred.shape[1]


def full_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A (num_kv_heads, head_dim, head_dim) float32, symmetric, of determinant 1."""
    of_queries, of_keys = moments(q, k)
    root = power(of_queries, 0.5)
    found = power(root @ power(root @ of_keys @ root, -0.5) @ root, 0.5)
    determinant = torch.linalg.slogdet(found)[1] / k.shape[-1]
    return (found / determinant.exp()[:, None, None]).float()


def pair_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """As ``full_map``, but diagonal and the same for both channels that RoPE turns together: it commutes with RoPE."""
    of_queries, of_keys = (x.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2) for x in moments(q, k))
    scale = (of_queries / of_keys.clamp(min=1e-12)) ** 0.25
    scale = scale / scale.log().mean(-1, keepdim=True).exp()
    return torch.diag_embed(torch.cat([scale, scale], -1)).float()


def through(x: torch.Tensor, key_map: torch.Tensor, quantize: Callable[[torch.Tensor], Any]) -> Any:
    """x (batch, num_kv_heads, n, head_dim) through the map, a quantiser, and back: what a reader with A^-T q sees."""
    back, bits = quantize(x @ key_map.mT)
    return back @ torch.linalg.inv(key_map).mT, bits
