"""What a gate is to learn: how much attention a token receives later. Exact attention, in blocks of queries.

A text of C tokens is followed by a request to repeat it and by the text again (KVzip, Kim et al. 2025). Targets of
token i of the first copy, for each KV head, over its query group; p(q -> i) is the model's attention probability:

``recon_max``, ``recon_sum``    max and sum of p(q -> i) over the queries of the second copy
``future_max_h``, ``future_sum_h``    the same over the queries of the first copy that come more than h tokens later
``lifespan``    distance of the last query of the first copy with p(q -> i) > SIGNIFICANT, 0 if none
``value_norm``    ||W_O v_i|| / ||h_i||, root mean square over the group: what attention to i moves (KVzip+, KVzap)

All are stored as natural logarithms in float16, floored at LOG_FLOOR, but for the lifespan: log4(lifespan + 1).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .recording import LayerCall

HORIZONS = (32, 256)
SIGNIFICANT = 0.01
LOG_FLOOR = -16.0
BLOCK = 32  # queries whose probabilities exist at a time: (num_heads, BLOCK, n) float32, best within the cache
TARGETS = (
    "recon_max", "recon_sum", *(f"future_{kind}_{h}" for h in HORIZONS for kind in ("max", "sum")), "lifespan",
    "value_norm",
)  # fmt: skip


def attention_targets(q: torch.Tensor, k: torch.Tensor, scale: float, length: int) -> dict[str, torch.Tensor]:
    """Targets that attention alone decides, as float16 (num_kv_heads, length); see the module's docstring.

    q (num_heads, n, head_dim), k (num_kv_heads, n, head_dim), rotated; the first ``length`` tokens are the text and the
    last ``length`` its repetition.
    """
    heads, n, head_dim = q.shape
    kv_heads, device = k.shape[0], q.device
    queries = (q.float() * scale).view(kv_heads, heads // kv_heads, n, head_dim)
    keys = k.float().transpose(1, 2)
    sums = {name: torch.zeros(kv_heads, length, device=device) for name in TARGETS if name != "value_norm"}
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        if length <= begin and end <= n - length:
            continue  # the request between the copies
        scores = queries[:, :, begin:end].flatten(1, 2) @ keys[:, :, :end]
        scores = scores.view(kv_heads, -1, end - begin, end)
        later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=device).triu(1)
        scores[..., begin:].masked_fill_(later, -torch.inf)
        p = scores.softmax(-1)[..., : min(end, length)]
        _add(sums, p.amax(1), p.sum(1), begin, n - length)
    out = {}
    for name, x in sums.items():
        x = (x + 1).log() / math.log(4) if name == "lifespan" else x.log().clamp(min=LOG_FLOOR)
        out[name] = x.half()
    return out


def _add(sums: dict[str, torch.Tensor], most: torch.Tensor, total: torch.Tensor, begin: int, repeats_from: int) -> None:
    """Take in a block: most, total (num_kv_heads, queries, keys) over the group; queries from position ``begin`` on."""
    count, width = most.shape[1:]
    q_pos = torch.arange(begin, begin + count, device=most.device)[:, None]

    def take(kind: str, name: str, x: torch.Tensor) -> None:
        mine = sums[name][:, :width]
        mine += x.sum(1) if kind == "sum" else (x.amax(1) - mine).clamp(min=0)

    repeats = max(repeats_from - begin, 0)  # of a block that straddles, the queries from here on repeat
    if repeats < count:
        take("max", "recon_max", most[:, repeats:])
        take("sum", "recon_sum", total[:, repeats:])
    length = sums["recon_max"].shape[1]
    first = min(max(length - begin, 0), count)
    if first == 0:
        return
    distance = q_pos[:first] - torch.arange(width, device=most.device)
    most, total = most[:, :first], total[:, :first]
    for h in HORIZONS:
        beyond = distance > h
        take("max", f"future_max_{h}", most * beyond)
        take("sum", f"future_sum_{h}", total * beyond)
    take("max", "lifespan", torch.where(most > SIGNIFICANT, distance, 0).float())


def value_norms(call: LayerCall, length: int) -> torch.Tensor:
    """(num_kv_heads, length) float16 log ||W_O v|| / ||h||, h: the layer's input."""
    kv_heads, head_dim = call.v.shape[1], call.v.shape[3]
    projection: Any = call.module.o_proj
    weight = projection.weight.float().view(-1, kv_heads, call.q.shape[1] // kv_heads, head_dim)
    gram = torch.einsum("okgd,okge->kde", weight, weight) / weight.shape[2]
    v = call.v[0, :, :length].float()
    norms = ((v @ gram) * v).sum(-1).clamp(min=0).sqrt()
    return (norms / call.residual[0, :length].float().norm(dim=-1)).log().clamp(min=LOG_FLOOR).half()
