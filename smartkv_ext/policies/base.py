"""What a policy is: one score per token and KV head, higher = keep. Nothing else decides anything.

The cache hands a policy a ``TokenView`` of the tokens that are about to leave the recent window; the scores go to
``select_kv``, which turns them into tiers under the byte budget. A policy is a frozen dataclass; whatever it must
remember lives in ``TokenView.state``, a dict of tensors that belongs to the cache layer (it is reordered, saved and
copied with it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from smartkv_ext.gates import Gates


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
    row_tokens: torch.Tensor  # (batch,) int64: tokens of each sequence so far, padding not counted
    received: torch.Tensor | None = None  # (batch, num_kv_heads, n) float32 attention from all queries so far
    recent: torch.Tensor | None = None  # the same from the newest ``recent_queries`` queries; None unless asked for
    inv_freq: torch.Tensor | None = None  # (head_dim / 2,) float32 RoPE angles per position; None: no RoPE known
    key_scores: torch.Tensor | None = None  # (batch, num_kv_heads, n) float32: what ``score_keys`` said of each token

    @property
    def seen(self) -> int:
        """Logical index of the next token."""
        return self.q_start + (0 if self.queries is None else self.queries.shape[2])


@dataclass
class RecordView:
    """Packed records of one layer at a packing step: what are they worth now?

    ``n`` counts the slots of the store; slots of position -1 are empty and whatever is said of them is ignored.
    """

    layer_idx: int
    num_layers: int
    stored: torch.Tensor  # (batch, num_kv_heads, n) float32, bfloat16 precision: what ``carried`` left with the record
    received: torch.Tensor | None  # stored + attention since the last packing; only if the policy accumulates
    recent: torch.Tensor | None  # (batch, num_kv_heads, n) float32, as in TokenView
    mass: torch.Tensor | None  # (batch, num_kv_heads, n) float32 attention from the newest ``num_queries`` queries
    num_queries: int
    positions: torch.Tensor  # (batch, num_kv_heads, n) int32
    seen: int  # logical index of the next token
    row_tokens: torch.Tensor  # (batch,) int64
    head_offset: int
    key_norms: Callable[[], torch.Tensor]  # (batch, num_kv_heads, n) float32; dequantises every key
    state: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Policy:
    """Base of all policies. Subclasses implement ``score`` and name themselves."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line for `smartkv policies`
    source: ClassVar[str] = ""  # paper or formula
    prefill_queries: ClassVar[int] = 0  # how many of a long forward's newest queries are handed over when it packs
    decode_queries: ClassVar[int] = (
        0  # and how many are remembered while decoding (their bytes count against the budget)
    )
    accumulates: ClassVar[bool] = False  # asks for ``received``: the attention that each token got from every query
    recent_queries: ClassVar[int] = 0  # asks for ``recent`` too, from this many newest queries
    needs_pre_rope_keys: ClassVar[bool] = False  # asks for them at packing: the window then holds them all
    scores_keys: ClassVar[bool] = False  # ``score_keys`` looks at tokens as they come: the window holds its answer
    shared_bytes: ClassVar[int] = 0  # weights that all caches of a process share
    evicts: ClassVar[bool] = True  # False: every token is kept, the budget only chooses its bits
    compares_heads: ClassVar[bool] = False  # True: scores of different heads of a layer are on one scale
    head_floor: ClassVar[float] = 0.0  # share of an even split that a head is sure of where heads compete
    keeps_sinks: ClassVar[bool] = True  # False: the first tokens are ordinary tokens

    def score(self, view: TokenView) -> torch.Tensor:
        """(batch, num_kv_heads, n) float32; -inf: evict whatever the budget. Entries at positions of -1 are ignored."""
        raise NotImplementedError

    def score_keys(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], first_layer: int, head_offset: int
    ) -> torch.Tensor:
        """(layers, batch, num_kv_heads, n) float32 of new tokens of consecutive layers; ``TokenView.key_scores`` later.

        keys (before RoPE), values: per layer (batch, num_kv_heads, n, head_dim), all on one device. Long forwards come
        layer by layer, a decoding step with all layers at once.
        """
        raise NotImplementedError

    def refresh(self, records: RecordView) -> torch.Tensor:
        """Scores of records that are already packed, as ``score``. Default: they never change."""
        return records.stored

    def carried(
        self, scores: torch.Tensor, received: torch.Tensor | None, layer_idx: int, head_offset: int,
        key_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What a record carries to the next packing, as one bfloat16: by default its score.

        scores, received, key_scores: (batch, num_kv_heads, n) float32; for records, key_scores is what they carried.
        """
        del received, layer_idx, head_offset, key_scores
        return scores

    def crop(self, state: dict[str, torch.Tensor], length: int) -> None:
        """Tokens at positions >= ``length`` were taken back. Default: nothing to do."""

    def layer_share(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> float:
        """Bytes of this layer's pages relative to an even split over the layers; the shares of all layers average 1."""
        del layer_idx, num_layers, num_kv_heads
        return 1.0

    @property
    def own_gates(self) -> Gates | None:
        """The gates that it scores with; None: none."""
        return None

    def for_model(self, config: Any) -> Policy:
        """The policy as it serves a model of this transformers config. Raises ValueError if it cannot."""
        del config
        return self

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        """Raise ValueError if the policy has learned from a model with other key projections (``gates.key_sketch``)."""

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        """Raise ValueError if the policy cannot serve a model of this shape."""

    @property
    def title(self) -> str:
        """What reports call the policy."""
        return self.name

    def spec(self) -> dict[str, Any]:
        """``get_policy(spec)`` gives an equal policy; plain JSON values."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        plain = {name: x.spec() if isinstance(x, Policy) else x for name, x in options.items()}
        return {"name": self.name, **plain}
