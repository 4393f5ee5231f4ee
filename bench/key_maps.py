"""Linear maps of keys that let quantisation noise fall where queries are small (gates/key_basis.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smartkv_ext.eval.recording import LayerRecording
from smartkv_ext.gates import balancing_map
from training.key_basis import moments


def full_map(q: torch.Tensor, k: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """A (num_kv_heads, head_dim, head_dim) float32, symmetric, of determinant 1, from q (num_heads, n, head_dim) and
    k (num_kv_heads, n, head_dim)."""
    of_queries, of_keys, _ = _moments(q, k)
    return balancing_map(of_queries, of_keys, strength).float()


def pair_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """As ``full_map``, but diagonal and the same for both channels that RoPE turns together: it commutes with RoPE."""
    found = _moments(q, k)[:2]
    of_queries, of_keys = (x.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2) for x in found)
    scale = (of_queries / of_keys.clamp(min=1e-12)) ** 0.25
    scale = scale / scale.log().mean(-1, keepdim=True).exp()
    return torch.diag_embed(torch.cat([scale, scale], -1)).float()


def through(x: torch.Tensor, key_map: torch.Tensor, quantize: Callable[[torch.Tensor], Any]) -> Any:
    """x (batch, num_kv_heads, n, head_dim) through the map, a quantiser, and back: what a reader with A^-T q sees."""
    back, bits = quantize(x @ key_map.mT)
    return back @ torch.linalg.inv(key_map).mT, bits


def _moments(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return moments(LayerRecording(q[None], k[None], k[None], k[None]))
