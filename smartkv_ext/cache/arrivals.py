"""Few new tokens in every layer: score their keys in one launch, at the end of the forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layer import SmartKVLayer


def score_arrivals(layers: Sequence[SmartKVLayer]) -> None:
    """Let the policy score what ``layers`` hold back, consecutive layers of one device together."""
    run: list[SmartKVLayer] = []
    for layer in layers:
        if layer.arrived is None:
            continue
        if run and (run[-1].layer_idx + 1 != layer.layer_idx or run[-1].device != layer.device):
            _score(run)
            run = []
        run.append(layer)
    if run:
        _score(run)


def _score(run: list[SmartKVLayer]) -> None:
    arrived = [layer.arrived for layer in run if layer.arrived is not None]
    keys: list[torch.Tensor] = [x[0] for x in arrived]
    scores = run[0].config.policy.score_keys(keys, [x[1] for x in arrived], run[0].layer_idx, run[0].head_offset)
    for layer, mine in zip(run, scores.unbind(0), strict=True):
        layer.write_key_scores(mine)
