"""What a policy is: one score per token and KV head, higher = keep. Nothing else decides anything.

The cache hands a policy a ``TokenView`` of the tokens that are about to leave the recent window; the scores go to
``select_kv``, which turns them into tiers under the byte budget. A policy is a frozen dataclass; whatever it must remember
lives in ``TokenView.state``, a dict of tensors that belongs to the cache layer (it is reordered, saved and copied with it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass
class TokenView:
    """Tokens of one layer that a policy scores.

    ``n`` counts the dense tokens of the layer (sinks, window and the ones that leave it), oldest first.
    """

    layer_idx: int
    num_layers: int
    keys: torch.Tensor  # (batch, num_kv_heads, n, head_dim), after RoPE, model dtype
    values: torch.Tensor  # (batch, num_kv_heads, n, head_dim)
    pre_rope_keys: torch.Tensor | None  # (batch, num_kv_heads, n, head_dim); only if the policy asks for them
    positions: torch.Tensor  # (batch, n) int32 logical index, -1: no token here (padding); its key may be anything
    queries: torch.Tensor | None  # (batch, num_heads, q_len, head_dim) of this forward, newest last; only at prefill
    q_start: int  # logical index of queries[:, :, 0]
    window_mass: torch.Tensor | None  # (batch, num_kv_heads, n) attention received from recent decode steps, float32
    mass_queries: int  # how many queries (per query head) window_mass sums over
    softmax_scale: float
    sliding_window: int  # 0: none
    head_offset: int  # index of the first local KV head in the whole model (tensor parallel)
    state: dict[str, torch.Tensor]  # batch-first tensors; persists from call to call


@dataclass(frozen=True)
class Policy:
    """Base of all policies. Subclasses implement ``score`` and name themselves."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line for `smartkv policies`
    source: ClassVar[str] = ""  # paper or formula
    needs_queries: ClassVar[bool] = False  # attention-based: queries at prefill, attention mass while decoding
    needs_pre_rope_keys: ClassVar[bool] = False
    evicts: ClassVar[bool] = True  # False: every token is kept, the budget only chooses its bits
    keeps_sinks: ClassVar[bool] = True  # False: the first tokens are ordinary tokens

    def score(self, view: TokenView) -> torch.Tensor:
        """(batch, num_kv_heads, n) float32. Entries at positions of -1 are ignored."""
        raise NotImplementedError

    def refresh(self, scores: torch.Tensor, mass: torch.Tensor | None, mass_queries: int) -> torch.Tensor:
        """New scores of records that are already packed; ``mass`` is the attention they received since the last call.

        scores, mass: any equal shape, float32. Default: scores never change.
        """
        del mass, mass_queries
        return scores
