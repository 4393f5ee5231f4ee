"""fp32 reference of gate_score."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gate_score(
    keys: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> torch.Tensor:
    """See smartkv_ext.ops.gate_score. ReLU between the layers, none after the last."""
    out = []
    for layer, key in enumerate(keys):
        x = key.float()  # (batch, num_kv_heads, kv_len, head_dim)
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = torch.einsum("bhnd,hod->bhno", x, weight[layer].float()) + bias[layer].float()[:, None, :]
            if i + 1 < len(weights):
                x = x.relu()
        out.append(x[..., 0])
    return torch.stack(out)
