"""What gates need to see of a model to know whether it is theirs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from smartkv_ext.gates import key_sketch

_SLOT = "_smartkv_sketch"


def sketch_of(model: nn.Module) -> torch.Tensor | None:
    """``gates.key_sketch`` of a transformers model's key projections, remembered; None where they are not whole
    floating-point matrices (quantised, sharded or not loaded yet).
    """
    if _SLOT not in model.__dict__:
        projections = [m.k_proj for m in model.modules() if hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
        weights = [cast(Any, projection).weight for projection in projections]
        plain = all(
            type(w) is nn.Parameter and w.is_floating_point() and not w.is_meta and not hasattr(w, "device_mesh")
            for w in weights
        )
        model.__dict__[_SLOT] = key_sketch(weights) if plain and weights else None
    return cast("torch.Tensor | None", model.__dict__[_SLOT])
