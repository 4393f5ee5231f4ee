"""Caches that hold what a quantiser would give back, and say what its codes would take.

They show a rival's quality without its kernels: keys and values go through quantise and dequantise once, after the
prefill, and the bytes are those of its storage format. Tokens that come later stay exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

Lossy = Callable[[torch.Tensor], tuple[torch.Tensor, float]]  # (batch, heads, n, head_dim) -> same, bits per value


def affine(x: torch.Tensor, bits: int, dim: int, group: int) -> torch.Tensor:
    """Round to 2^bits levels between the least and the greatest of every ``group`` values along ``dim`` (asymmetric
    min-max, fp16 scale and zero). The length along ``dim`` must be a multiple of ``group``."""
    grouped = x.float().unflatten(dim, (-1, group))
    inner = dim + 1 if dim >= 0 else dim
    low, high = grouped.amin(inner, keepdim=True), grouped.amax(inner, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    zero = low.half().float()
    codes = ((grouped - zero) / scale).round().clamp(0, 2**bits - 1)
    out: torch.Tensor = (codes * scale + zero).flatten(dim if dim >= 0 else dim - 1, inner)
    return out.to(x.dtype)


def per_token(bits: int, group: int) -> Lossy:
    """Groups along the channels of a token; scale and zero are 32 bits per group."""
    return lambda x: (affine(x, bits, -1, min(group, x.shape[-1])), bits + 32 / min(group, x.shape[-1]))


def per_channel(bits: int, group: int) -> Lossy:
    """KIVI's keys: groups of ``group`` tokens in every channel. The length must be a multiple of ``group``."""
    return lambda x: (affine(x, bits, 2, group), bits + 32 / group)


class SimulatedCache(DynamicCache):
    """Everything but the newest ``residual`` tokens of the first update goes through ``keys`` and ``values``.

    The residual grows by what does not fill a group of ``group`` tokens, as in KIVI.
    """

    def __init__(self, config: Any, keys: Lossy, values: Lossy, residual: int, group: int, sinks: int = 0) -> None:
        super().__init__(config=config)
        self._keys, self._values = keys, values
        self._residual, self._group, self._sinks = residual, group, sinks
        self._saved_bits = 0.0  # what the codes take less than what DynamicCache holds in their place

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self.get_seq_length(layer_idx) == 0:
            old = key_states.shape[2] - self._residual - self._sinks
            count = max(old - old % self._group, 0)
            if count:
                key_states = self._replace(key_states, self._keys, count)
                value_states = self._replace(value_states, self._values, count)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _replace(self, x: torch.Tensor, lossy: Lossy, count: int) -> torch.Tensor:
        begin, end = self._sinks, self._sinks + count
        packed, bits = lossy(x[:, :, begin:end])
        self._saved_bits += packed.numel() * (8 * x.itemsize - bits)
        return torch.cat([x[:, :, :begin], packed.to(x.dtype), x[:, :, end:]], 2)

    @property
    def held_bytes(self) -> int:
        """Codes, scales, zeros and the exact tokens."""
        layers: list[Any] = self.layers
        dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return int(dense - self._saved_bits / 8)
