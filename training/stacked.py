"""All gates of all layers as one module: stacked weights, one batched matmul per linear layer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

WIDTHS = {"regression": (64,), "binary": (256, 256)}  # hidden layers; "compact" has one of a quarter of the head_dim


def hidden_widths(kind: str, head_dim: int, hidden_size: int | None) -> tuple[int, ...]:
    """Hidden layers of a gate: (64,) GateMLP, (256, 256) BinaryGateMLP, (head_dim / 4,) compact; or ``hidden_size``."""
    widths = WIDTHS.get(kind, (head_dim // 4,))
    return widths if hidden_size is None else (hidden_size,) * len(widths)


class StackedGates(nn.Module):
    """``count`` MLPs side by side, each with its own inputs, which are standardised first.

    mean, std: (count, width) of the inputs. The outputs are standardised too: ``out_mean``, ``out_std`` (count,).
    """

    def __init__(
        self, mean: torch.Tensor, std: torch.Tensor, out_mean: torch.Tensor, out_std: torch.Tensor,
        hidden: tuple[int, ...], generator: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        count, width = mean.shape
        sizes = (width, *hidden, 1)
        for name, x in (("mean", mean), ("std", std), ("out_mean", out_mean), ("out_std", out_std)):
            self.register_buffer(name, x)
        self.weights = nn.ParameterList(
            torch.randn(count, i, o, generator=generator) * (2 / i) ** 0.5 for i, o in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(count, 1, o) for o in sizes[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (count, n, width) of any dtype -> (count, n) standardised outputs."""
        buffers: Any = self
        y = (x.float() - buffers.mean[:, None]) / buffers.std[:, None]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias, y, weight)
            y = y.relu() if i + 1 < len(self.weights) else y
        return y[..., 0]

    @torch.no_grad()
    def folded(self, shape: tuple[int, int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights (*shape, out, in) and biases (*shape, out) of Gates, both standardisations folded in.

        The first weights are rounded to bfloat16, as they will be stored, before their share of the mean goes into the
        bias: keys with a large bias would otherwise turn rounding into an offset.
        """
        buffers: Any = self
        weights = [w.transpose(1, 2).clone() for w in self.weights]
        biases = [b[:, 0].clone() for b in self.biases]
        weights[0] = (weights[0] / buffers.std[:, None]).bfloat16().float()
        biases[0] -= (weights[0] @ buffers.mean[..., None])[..., 0]
        weights[-1] = weights[-1] * buffers.out_std[:, None, None]
        biases[-1] = biases[-1] * buffers.out_std[:, None] + buffers.out_mean[:, None]
        return [w.unflatten(0, shape) for w in weights], [b.unflatten(0, shape) for b in biases]
