"""Ways to hold the keys and values of a document, by a line of text: a name, then options as key=value.

full                                      DynamicCache
smartkv policy=snapkv budget=0.125        SmartKVCache, any of its arguments
uniform bits=4                            SmartKVCache that keeps every token at 4 bits
quanto bits=4, hqq bits=4                 QuantizedCache of transformers
kivi bits=2 group=32 residual=128         simulated, see ``simulated``
tokenwise bits=4 group=32                 simulated min-max quantisation per token
kvpress press=SnapKVPress budget=0.25     a press of NVIDIA/kvpress, where it can be imported
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import Cache

from smartkv_ext.cache import SmartKVCache
from smartkv_ext.hf.gate_check import sketch_of

from .recording import Recording, replay
from .simulated import SimulatedCache, per_channel, per_token

_KINDS = ("full", "smartkv", "uniform", "quanto", "hqq", "kivi", "tokenwise", "kvpress")
_WITH_BUDGET = ("smartkv", "kvpress")
_SIMULATED = ("bits", "group", "residual", "sinks", "v_bits")
_OPTIONS = {  # of the kinds whose options are not another library's or the cache's own to check
    "full": (),
    "quanto": ("axis", "bits", "group"),
    "hqq": ("axis", "bits", "group"),
    "kivi": _SIMULATED,
    "tokenwise": _SIMULATED,
}
_RECENT = 128  # tokens that QuantizedCache and KIVI leave exact


@dataclass(frozen=True)
class Method:
    """A kind of cache and its options."""

    kind: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        """The line that ``get_method`` reads; the same for equal methods."""
        return " ".join([self.kind, *(f"{k}={shlex.quote(v)}" for k, v in sorted(self.options.items()))])

    @property
    def family(self) -> str:
        """The spec without its budget and its bits: what a curve joins."""
        rest = {k: v for k, v in self.options.items() if k not in ("budget", "bits")}
        return Method(self.kind, rest).spec

    @property
    def is_rival(self) -> bool:
        """Whether another package does the work."""
        return self.kind in ("quanto", "hqq", "kvpress")

    @property
    def takes_budget(self) -> bool:
        """Whether the method can be asked for a number of bytes and has not been yet."""
        return self.kind in _WITH_BUDGET and "budget" not in self.options

    def with_budget(self, budget: str) -> Method:
        """The same at a budget."""
        return Method(self.kind, {**self.options, "budget": budget})

    def prefill(self, model: Any, recording: Recording) -> Cache:
        """A new cache that holds the recorded document. Raises ValueError for options that the kind does not have."""
        if self.kind == "kvpress":
            from .presses import press_prefill

            return press_prefill(model, recording.ids, **self.options)
        cache = self._new_cache(model.config)
        if isinstance(cache, SmartKVCache):
            cache.check_keys(lambda: sketch_of(model))  # as the forward that is replayed did
        replay(recording, cache)
        return cache

    def _new_cache(self, config: Any) -> Cache:
        given = dict(self.options)
        if self.kind == "smartkv":
            return SmartKVCache(config, **smartkv_arguments(given))
        if self.kind == "uniform":
            given["tiers"] = given.pop("bits", "4")
            return SmartKVCache(config, **smartkv_arguments({"budget": "none", "policy": "full"} | given))
        bits = int(given.pop("bits", 4))
        if self.kind == "full":
            cache: Cache = DynamicCache(config=config)
        elif self.kind in ("quanto", "hqq"):
            axis = int(given.pop("axis", 0 if self.kind == "quanto" else 1))  # as transformers' documentation advises
            size = int(given.pop("group", 64))
            cache = QuantizedCache(self.kind, config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=size)
        else:
            group, residual = int(given.pop("group", 32)), int(given.pop("residual", _RECENT))
            sinks = int(given.pop("sinks", 0))
            keys = per_channel(bits, group) if self.kind == "kivi" else per_token(bits, group)
            values = per_token(int(given.pop("v_bits", bits)), group)
            cache = SimulatedCache(config, keys, values, residual, group, sinks)
        return cache


def get_method(spec: str) -> Method:
    """Read a line of text. Raises ValueError naming what is wrong."""
    kind, *items = shlex.split(spec) or [""]
    if kind not in _KINDS:
        raise ValueError(f"method must begin with one of {', '.join(_KINDS)}; got {spec!r}")
    options = {}
    for item in items:
        name, found, value = item.partition("=")
        if not found or not value:
            raise ValueError(f"options of a method look like name=value; got {item!r} in {spec!r}")
        options[name] = value
    unknown = sorted(set(options) - set(_OPTIONS.get(kind, options)))
    if unknown:
        has = f"it has {', '.join(_OPTIONS[kind])}" if _OPTIONS[kind] else "it has none"
        raise ValueError(f"method {kind!r} has no option {', '.join(unknown)}; {has}")
    return Method(kind, options)


def smartkv_arguments(options: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of SmartKVCache from text. Raises ValueError for a number that is none."""
    arguments: dict[str, Any] = {"min_tokens": 0} | dict(options)  # methods are compared at the bytes that they name
    if arguments.get("budget") == "none":
        arguments["budget"] = None
    if "tiers" in arguments:
        arguments["tiers"] = tuple(arguments["tiers"].split(","))
    for name in ("mean_shift", "key_basis"):
        if arguments.get(name) in ("0", "1"):
            arguments[name] = arguments[name] == "1"
    for name in ("window", "sinks", "min_tokens"):
        if name in arguments:
            arguments[name] = int(arguments[name])
    return arguments


@dataclass(frozen=True)
class Held:
    """What a cache holds. ``full_bytes``: the bf16 cache of the same tokens."""

    num_bytes: int
    full_bytes: int
    kept: dict[str, float]  # tokens per tier, mean over layers and heads

    @property
    def ratio(self) -> float:
        """num_bytes / full_bytes."""
        return self.num_bytes / self.full_bytes


def held(cache: Cache, recording: Recording, tokens: int) -> Held:
    """Bytes of ``cache`` when it stands for the first ``tokens`` tokens."""
    if isinstance(cache, SmartKVCache):
        report = cache.report()
        return Held(report.total_bytes, report.full_bytes, report.tokens_per_tier)
    k = recording.layers[0].k
    full = len(recording.layers) * tokens * k.shape[0] * k.shape[1] * k.shape[3] * 2 * torch.bfloat16.itemsize
    if isinstance(cache, SimulatedCache):
        return Held(cache.held_bytes, full, {})
    return Held(sum(tensor_bytes(vars(layer)) for layer in cache.layers), full, {})


def tensor_bytes(x: Any) -> int:
    """Bytes of every tensor in nested containers and in tensor subclasses that wrap others (quanto's)."""
    if isinstance(x, torch.Tensor):
        if hasattr(x, "__tensor_flatten__"):
            names, _ = x.__tensor_flatten__()
            return sum(tensor_bytes(getattr(x, name)) for name in names)
        return x.nbytes
    if isinstance(x, Mapping):
        return sum(map(tensor_bytes, x.values()))
    return sum(map(tensor_bytes, x)) if isinstance(x, (list, tuple)) else 0
