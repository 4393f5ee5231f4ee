"""What a policy is: one score per token and KV head, higher = keep. Nothing else decides anything.

The cache hands a policy a ``TokenView`` of the tokens that are about to leave the recent window; the scores go to
``select_kv``, which turns them into tiers under the byte budget. A policy is a frozen dataclass; whatever it must
remember lives in ``TokenView.state``, a dict of tensors that belongs to the cache layer (it is reordered, saved and
copied with it).
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
    queries: (
        torch.Tensor | None
    )  # (batch, num_heads, q_len, head_dim) the newest queries, oldest first; None unless asked for
    lse: (
        torch.Tensor | None
    )  # (batch, num_heads, q_len) of those queries over *all* tokens, packed ones too; None: over keys
    q_start: int  # logical index of queries[:, :, 0]
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
    prefill_queries: ClassVar[int] = 0  # attention-based policies: how many of the newest queries a prefill hands over
    decode_queries: ClassVar[int] = (
        0  # and how many are remembered while decoding (their bytes count against the budget)
    )
    needs_pre_rope_keys: ClassVar[bool] = False
    evicts: ClassVar[bool] = True  # False: every token is kept, the budget only chooses its bits
    compares_heads: ClassVar[bool] = False  # True: scores of different heads of a layer are on one scale
    keeps_sinks: ClassVar[bool] = True  # False: the first tokens are ordinary tokens

    def score(self, view: TokenView) -> torch.Tensor:
        """(batch, num_kv_heads, n) float32. Entries at positions of -1 are ignored."""
        raise NotImplementedError

    def refresh(self, scores: torch.Tensor, mass: torch.Tensor, num_queries: int) -> torch.Tensor:
        """New scores of records that are already packed; called only if the policy asks for queries.

        scores, mass: (batch, num_kv_heads, num_records) float32; mass is the attention that the records received
        from the newest ``num_queries`` queries, summed over them and over the query group. Default: scores never
        change.
        """
        del mass, num_queries
        return scores

    def crop(self, state: dict[str, torch.Tensor], length: int) -> None:
        """Tokens at positions >= ``length`` were taken back. Default: nothing to do."""
