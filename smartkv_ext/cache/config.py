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
from smartkv_ext.reference.layout import HEAD_DIMS, PAGE_SIZE

from .meter import meter_names

SCOPES = ("head", "layer", "global")
PRECISIONS = ("auto", "fp32", "int16", "int8")
MIN_WINDOW = 16  # newest tokens that are never packed, however small the budget
MIN_BLOCK = 8  # fewest tokens packed at a time
MAX_BLOCK = PAGE_SIZE
DENSE_SHARE = 0.25  # of the byte budget that sinks and window may take before the window shrinks
UNLIMITED = 2**62
KEY_SCORE = "key_score"  # buffer of the window: what the policy said of a token when it came


@dataclass(frozen=True)
class ModelGeometry:
    """The facts of a model that decide a cache's shape."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    sliding_windows: tuple[int, ...] = field(default=())  # per layer, 0: full attention

    @classmethod
    def from_config(cls, config: Any) -> ModelGeometry:
        """Read a transformers config (the text part of a multimodal one). Raises TypeError for anything else."""
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a transformers config, as model.config is; got {type(config).__name__}")
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
    turn_freq: tuple[float, ...] = ()  # inv_freq where mean keys may turn by it: see turning.py

    @classmethod
    def create(
        cls, geometry: ModelGeometry, inv_freq: tuple[float, ...], *, budget: float | str | Budget | None,
        policy: str | Policy, tiers: Sequence[int | str] | None, sinks: int, window: int, scope: str, levels: str,
        mean_shift: bool, precision: str, key_basis: KeyBasis | None, turn_freq: tuple[float, ...] = (),
    ) -> CacheConfig:  # fmt: skip
        """Raise ValueError or TypeError naming the argument, what came and what is accepted."""
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
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
            turn_freq=turn_freq,
        )
        config.check_budget(torch.bfloat16.itemsize, batch=1)
        return config

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

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the full bf16 cache of ``tokens`` tokens, all layers and heads of the whole model."""
        g = self.geometry
        return tokens * g.num_layers * g.num_kv_heads * g.head_dim * 2 * torch.bfloat16.itemsize

    def check_budget(self, itemsize: int, batch: int) -> None:
        """Raise ValueError if the budget can never hold sinks and the smallest window of ``batch`` sequences."""
        g = self.geometry
        dense = self.num_sinks + min(self.window, MIN_WINDOW) + MIN_BLOCK
        per_token = g.num_layers * self.dense_token_bytes(g.num_kv_heads, itemsize)
        vectors = 2 if self.turn_freq and self.key_basis is None else 1  # mean key, weights of channels
        need = batch * (dense * per_token + g.num_layers * g.num_kv_heads * g.head_dim * 4 * vectors)
        limit = self.budget.num_bytes
        if self.budget.fraction is not None and g.max_positions:
            limit = self.budget.limit(batch * self.full_bytes(g.max_positions))
        if limit is not None and limit < need:
            raise ValueError(
                f"budget must be at least {need:,} bytes: {self.num_sinks} sinks, {dense - self.num_sinks} recent "
                f"tokens and the mean keys of {batch} sequence(s) need them; got {limit:,} bytes"
            )

    def layer_budget(self, tokens: int, batch: int, num_kv_heads: int) -> int:
        """Bytes that one layer of one sequence may hold: the budget of ``tokens`` tokens split evenly over the layers.

        ``num_kv_heads`` are the local heads: under tensor parallelism every rank holds its share.
        """
        limit = self.budget.limit(self.full_bytes(tokens))
        if limit is None:
            return UNLIMITED
        if self.budget.num_bytes is not None:
            limit //= batch
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
