"""Which token every head kept, and at how many bits: numbers for the pictures and the token view."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from .data import label


@dataclass(frozen=True)
class KeptMap:
    """bits (layers, heads, tokens) float32, mean of keys and values, 0: evicted; the tokens as text."""

    title: str
    ratio: float
    bits: torch.Tensor
    texts: list[str]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> KeptMap:
        """Read a row of kind "map"."""
        raw = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(row["map"]))), dtype=torch.uint8)
        title = f"{label(row['method'])} | {row['task']} {row['document']}"
        return cls(title, row["ratio"], raw.view(row["map_shape"]) / row.get("map_unit", 1), row["token_texts"])

    def kept_share(self) -> torch.Tensor:
        """(layers, heads) share of tokens kept."""
        return (self.bits > 0).float().mean(2)

    def tier_shares(self) -> dict[float, torch.Tensor]:
        """bits -> (layers,) share of tokens, mean over heads."""
        return {b: (self.bits == b).float().mean((1, 2)) for b in self.bits.unique().tolist()}

    def for_browser(self) -> dict[str, Any]:
        """Per layer and token two bytes: how many heads kept it, and the mean bits of those times 10. The last layer
        of the array is the mean over all layers, its heads as a share of 255."""
        heads = self.bits.shape[1]
        kept = (self.bits > 0).sum(1)
        mean = self.bits.float().sum(1) / kept.clamp(min=1)
        all_kept = (self.bits > 0).float().mean((0, 1)) * 255
        all_mean = self.bits.float().sum((0, 1)) / (self.bits > 0).sum((0, 1)).clamp(min=1)
        share = torch.cat([kept.float() * 255 / heads, all_kept[None]]).round().to(torch.uint8)
        tenths = torch.cat([mean, all_mean[None]]).mul(10).round().to(torch.uint8)
        packed = torch.stack([share, tenths]).numpy().tobytes()
        return {
            "title": self.title, "layers": self.bits.shape[0], "heads": heads, "tokens": self.bits.shape[2],
            "texts": self.texts, "data": base64.b64encode(packed).decode(),
        }  # fmt: skip
