"""What a cache was asked to do, and how bytes are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smartkv_ext.gates import KeyBasis
from smartkv_ext.policies import Policy, get_policy
from smartkv_ext.quant import Budget, QuantSpec, default_tiers, parse_budget
from smartkv_ext.reference.layout import HEAD_DIMS, PAGE_SIZE, tier_name

from .meter import meter_names

SCOPES = ("head", "layer", "global")
PRECISIONS = ("auto", "fp32", "int16", "int8")
MIN_WINDOW = 16  # newest tokens that are never packed, however small the budget
MIN_BLOCK = 8  # fewest tokens packed at a time
MAX_BLOCK = PAGE_SIZE
DENSE_SHARE = 0.25  # of the byte budget that sinks and window may take before the window shrinks
UNLIMITED = 2**62
MIN_TOKENS = 128  # a fraction never means fewer bytes than this many full tokens take
STATE_SHARE = 0.05  # of the byte budget that a policy may remember queries in
KEY_SCORE = "key_score"  # buffer of the window: what the policy said of a token when it came


@dataclass(frozen=True)
class ModelGeometry:
    """The facts of a model that decide a cache's shape."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    sliding_windows: tuple[int, ...] = field(default=())  # per layer, 0: full attention
    num_heads: int = field(default=0, compare=False)  # of queries; no part of a cache's shape

    @classmethod
    def from_config(cls, config: Any) -> ModelGeometry:
        """Read a transformers config (the text part of a multimodal one). Raises TypeError for anything else."""
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"config must be a model or a transformers config, as model.config is; got {type(config).__name__}"
            )
        config = config.get_text_config(decoder=True)
        num_layers = config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"config.head_dim must be one of {', '.join(map(str, HEAD_DIMS))}; got {head_dim}")
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if types is None:  # Mistral: no layer_types, and all layers slide when a window is set
            types = ["full_attention" if window is None else "sliding_attention"] * num_layers
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(f"config.layer_types may hold full_attention and sliding_attention; got {sorted(unknown)}")
        return cls(
            num_layers=num_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
            max_positions=getattr(config, "max_position_embeddings", None),
            sliding_windows=tuple((window or 0) if t == "sliding_attention" else 0 for t in types),
            num_heads=config.num_attention_heads,
        )


def inverse_frequencies(config: Any) -> tuple[float, ...]:
    """RoPE angle per position of each channel pair, from a transformers config; empty where it names no RoPE."""
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" not in parameters:
        return ()
    if parameters["rope_type"] != "default":
        return tuple(ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)[0].tolist())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return tuple(parameters["rope_theta"] ** (-i / head_dim) for i in range(0, head_dim, 2))


@dataclass(frozen=True)
class CacheConfig:
    """Checked arguments of SmartKVCache."""

    budget: Budget
    policy: Policy
    quant: QuantSpec
    num_sinks: int
    window: int
    scope: str
    precision: str
    geometry: ModelGeometry
    inv_freq: tuple[float, ...] = ()  # RoPE angles per position of the channel pairs, for policies that look ahead
    key_basis: KeyBasis | None = None  # in which keys are held
    min_tokens: int = MIN_TOKENS
    turn_freq: tuple[float, ...] = ()  # inv_freq where mean keys may turn by it: see turning.py

    @classmethod
    def create(
        cls, geometry: ModelGeometry, inv_freq: tuple[float, ...], *, budget: float | str | Budget | None,
        policy: str | Policy, tiers: Sequence[int | str] | None, sinks: int, window: int, scope: str, levels: str,
        mean_shift: bool, precision: str, key_basis: KeyBasis | None, min_tokens: int = MIN_TOKENS,
        turn_freq: tuple[float, ...] = (),
    ) -> CacheConfig:  # fmt: skip
        """Raise ValueError or TypeError naming the argument, what came and what is accepted."""
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        for name, value, least in (("sinks", sinks, 0), ("window", window, 1), ("min_tokens", min_tokens, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        policy = get_policy(policy)
        policy.check(geometry.num_layers, geometry.num_kv_heads)
        if scope == "global" and len(set(geometry.sliding_windows)) > 1:
            raise ValueError(
                "scope must be head or layer for a model that mixes full and sliding attention; got 'global'"
            )
        config = cls(
            budget=parse_budget(budget),
            policy=policy,
            quant=QuantSpec.create(default_tiers(policy.evicts) if tiers is None else tiers, levels, mean_shift),
            num_sinks=sinks if policy.keeps_sinks else 0,
            window=window,
            scope=scope,
            precision=precision,
            geometry=geometry,
            inv_freq=inv_freq,
            key_basis=key_basis,
            min_tokens=min_tokens,
            turn_freq=turn_freq,
        )
        config.check_budget(torch.bfloat16.itemsize, batch=1)
        config.check_keeps_all()
        return config

    def check_keeps_all(self) -> None:
        """Raise ValueError for a fraction at which a policy that keeps every token cannot keep them at any tier."""
        g = self.geometry
        record = self.quant.layouts(g.head_dim, torch.bfloat16)[0].page_bytes / PAGE_SIZE
        least = record / (2 * g.head_dim * torch.bfloat16.itemsize)
        if not self.policy.evicts and self.budget.fraction is not None and self.budget.fraction < least:
            raise ValueError(
                f"budget must be at least {least:.3f} of the full cache for policy {self.policy.name!r}, which keeps "
                f"every token, at {tier_name(self.quant.tiers[0])} bits or more; got {self.budget.fraction:.4g}"
            )

    def dense_token_bytes(self, num_kv_heads: int, itemsize: int) -> int:
        """Bytes of a token in the dense window of one layer, its position aside."""
        per_head = self.geometry.head_dim * len(self.buffers) * itemsize + 4 * len(self.sums)
        return num_kv_heads * per_head

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the window's buffers."""
        return ("k", "v", "pre_rope") if self.policy.needs_pre_rope_keys else ("k", "v")

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of the window's buffers of one float32 per token and head."""
        return meter_names(self.policy) + ((KEY_SCORE,) if self.policy.scores_keys else ())

    def full_bytes(self, tokens: int, itemsize: int = torch.bfloat16.itemsize) -> int:
        """Bytes of the full cache (bf16 is the yardstick) of ``tokens`` tokens, all layers and heads of the model."""
        g = self.geometry
        return tokens * g.num_layers * g.num_kv_heads * g.head_dim * 2 * itemsize

    def query_bytes(self, num_kv_heads: int, itemsize: int) -> int:
        """Bytes of one remembered query in all heads of a layer, of which ``num_kv_heads`` KV heads are here."""
        g = self.geometry
        return g.num_heads * num_kv_heads // g.num_kv_heads * g.head_dim * itemsize

    def decode_queries(self, tokens: int, batch: int, num_kv_heads: int, itemsize: int) -> int:
        """How many of the newest queries the policy may remember between packings: those that it asks for, fewer where
        they would take more than STATE_SHARE of a layer's bytes, at least one if it asks for any."""
        room = int(STATE_SHARE * self.layer_budget(tokens, batch, num_kv_heads, itemsize))
        return min(self.policy.decode_queries, max(room // self.query_bytes(num_kv_heads, itemsize), 1))

    def check_budget(self, itemsize: int, batch: int) -> None:
        """Raise ValueError if the budget can never hold sinks and the smallest window of ``batch`` sequences."""
        g = self.geometry
        dense = self.num_sinks + min(self.window, MIN_WINDOW) + MIN_BLOCK
        per_layer = dense * (self.dense_token_bytes(g.num_kv_heads, itemsize) + 4)
        vectors = 2 if self.turn_freq and self.key_basis is None else 1  # mean key, weights of channels
        per_layer += self.table_bytes(g.num_kv_heads) + g.num_kv_heads * g.head_dim * 4 * vectors
        per_layer += self.query_bytes(g.num_kv_heads, itemsize) if self.policy.decode_queries else 0
        per_layer += 4 * (g.num_kv_heads * g.head_dim + g.num_heads)  # most that a policy keeps of what it has seen
        if self.turn_freq:  # means that turn may take a sixteenth beside (turning.py)
            per_layer = per_layer * 16 // 15 + 1
        need = batch * g.num_layers * per_layer
        limit = self.budget.num_bytes
        if self.budget.fraction is not None and g.max_positions:
            limit = self.fraction_limit(g.max_positions, itemsize, batch)
        if limit is not None and limit < need:
            raise ValueError(
                f"budget must be at least {need:,} bytes: {self.num_sinks} sinks, {dense - self.num_sinks} recent "
                f"tokens, mean keys and tables of {batch} sequence(s) need them; got {limit:,} bytes"
            )

    def table_bytes(self, num_kv_heads: int) -> int:
        """Bytes of a sequence in a layer for counts of records and of tokens, position and slot."""
        return num_kv_heads * 4 * len(self.quant.tiers) + 24

    def fraction_limit(self, tokens: int, itemsize: int, batch: int = 1) -> int:
        """Bytes that a fraction means for ``tokens`` tokens of each of ``batch`` sequences: it begins to bind where it
        is worth ``min_tokens`` tokens in the model's own dtype, and what is shorter is kept."""
        assert self.budget.fraction is not None
        floor = self.full_bytes(min(tokens, self.min_tokens), itemsize)
        return batch * max(int(self.budget.fraction * self.full_bytes(tokens)), floor)

    def layer_budget(self, tokens: int, batch: int, num_kv_heads: int, itemsize: int) -> int:
        """Bytes that one layer of one sequence may hold: the budget of ``tokens`` tokens split evenly over the layers.

        ``num_kv_heads`` are the local heads: under tensor parallelism every rank holds its share.
        """
        limit = None if self.budget.num_bytes is None else self.budget.num_bytes // batch
        if self.budget.fraction is not None:
            limit = self.fraction_limit(tokens, itemsize)
        if limit is None:
            return UNLIMITED
        g = self.geometry
        return limit * num_kv_heads // (g.num_layers * g.num_kv_heads)

    def dense_sizes(self, layer_budget: int, num_kv_heads: int, itemsize: int) -> tuple[int, int]:
        """(window, block): newest tokens kept dense, and how many more may gather before they are packed.

        Both shrink, down to MIN_WINDOW and MIN_BLOCK, where sinks, window and block would take more than DENSE_SHARE of
        the bytes: the window first, since packing rarely is what a large block is for, and old tokens that matter are
        worth more than new ones that do not.
        """
        per_token = self.dense_token_bytes(num_kv_heads, itemsize) + 4
        room = int(DENSE_SHARE * layer_budget) // per_token - self.num_sinks
        block = min(MAX_BLOCK, max(MIN_BLOCK, min(self.window // 2, room * 2 // 3)))
        return min(self.window, max(MIN_WINDOW, room - block)), block

    def first_capacity(self, tokens: int, batch: int, num_kv_heads: int, itemsize: int) -> int:
        """Tokens at which a layer packs for the first time when ``tokens`` come first: never while all of them fit as
        they are."""
        budget = self.layer_budget(tokens, batch, num_kv_heads, itemsize)
        capacity = self.num_sinks + sum(self.dense_sizes(budget, num_kv_heads, itemsize))
        if self.budget.fraction is not None:
            return max(capacity, self.min_tokens + 1)
        if self.budget.num_bytes is None:
            return capacity
        g, queries = self.geometry, self.decode_queries(tokens, batch, num_kv_heads, itemsize)
        room = budget - self.table_bytes(num_kv_heads) - queries * self.query_bytes(num_kv_heads, itemsize)
        if self.turn_freq:  # power of queries, measured until then; where there is a basis as well: one time to pack
            room -= num_kv_heads * g.head_dim // 2 * 4
        return max(capacity, room // (self.dense_token_bytes(num_kv_heads, itemsize) + 4))
