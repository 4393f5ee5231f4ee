"""A cache on disk: one safetensors file, plain tensors and a JSON header. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from smartkv_ext.gates import Gates, KeyBasis
from smartkv_ext.policies import POLICIES, Policy, get_policy
from smartkv_ext.quant import Budget, QuantSpec
from smartkv_ext.reference.layout import PAGE_FORMAT_VERSION

from .basis import find_key_basis
from .config import CacheConfig, ModelGeometry
from .meter import AttentionMeter
from .store import PagedStore
from .window import DenseWindow

if TYPE_CHECKING:
    from .cache import SmartKVCache
    from .layer import SmartKVLayer

FORMAT_VERSION = 4  # 2 knows no key basis, 3 no means that turn
_LAYER_FIELDS = (
    "seen", "head_offset", "capacity", "uncommitted", "lost_until", "softmax_scale", "recent_count",
)  # fmt: skip


def save(cache: SmartKVCache, path: Path) -> None:
    """See SmartKVCache.save. The file appears whole or not at all."""
    config = cache.smartkv_config
    if POLICIES.get(config.policy.name) is not type(config.policy):
        raise ValueError(f"policy {config.policy.name!r} is not one of smartkv_ext.policies: a file could not name it")
    header = {
        "format_version": FORMAT_VERSION,
        "page_format_version": PAGE_FORMAT_VERSION,
        "geometry": dataclasses.asdict(config.geometry),
        "budget": dataclasses.asdict(config.budget),
        "policy": config.policy.spec(),
        "quant": dataclasses.asdict(config.quant),
        "num_sinks": config.num_sinks,
        "min_tokens": config.min_tokens,
        "window": config.window,
        "scope": config.scope,
        "precision": config.precision,
        "layers": [_layer_header(layer) for layer in cache.layers],
    }
    tensors = {f"{i}.{name}": x for i, layer in enumerate(cache.layers) for name, x in _layer_tensors(layer).items()}
    if config.key_basis is not None:
        tensors["key_basis"] = config.key_basis.packed
    partial = path.with_name(path.name + ".partial")
    save_file({name: x.contiguous() for name, x in tensors.items()}, partial, {"smartkv_cache": json.dumps(header)})
    os.replace(partial, path)


def _layer_header(layer: SmartKVLayer) -> dict[str, Any] | None:
    if not layer.is_initialized:
        return None
    fields = {name: getattr(layer, name) for name in _LAYER_FIELDS}
    fields |= {"recording": layer.record_past, "query_keep": layer.query_keep}
    return fields | {"used": layer.window.used, "sink_slots": layer.window.sink_slots}


def _layer_tensors(layer: SmartKVLayer) -> dict[str, torch.Tensor]:
    if not layer.is_initialized:
        return {}
    tensors = layer.window.tensors() | layer.store.tensors() | {"row_tokens": layer.row_tokens}
    tensors |= {f"state.{name}": x for name, x in layer.state.items()}
    tensors |= {f"meter.{name}": x for name, x in layer.meter.sums.items()}
    return tensors if layer.queries is None else tensors | {"queries": layer.queries}


def load(cls: type[SmartKVCache], path: Path, config: Any, device: str | torch.device) -> SmartKVCache:
    """See SmartKVCache.load."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file written by SmartKVCache.save; {path} does not exist")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            text = (file.metadata() or {}).get("smartkv_cache")
            if text is None:
                raise ValueError(f"{path} was not written by SmartKVCache.save: its header is missing")
            header = json.loads(text)
            # Cloned: kernels want 64-byte alignment, which a mapped file does not promise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    # Version 2 of the page format has tiers that version 1 lacks; pages of the others are the same.
    readable = {
        "format_version": [2, 3, FORMAT_VERSION],
        "page_format_version": list(range(1, PAGE_FORMAT_VERSION + 1)),
    }
    for name, known in readable.items():
        if header.get(name) not in known:
            raise ValueError(
                f"{path} has {name} {header.get(name)}; this smartkv_ext reads {' and '.join(map(str, known))}"
            )
    geometry = ModelGeometry.from_config(config)
    saved = header["geometry"] | {"sliding_windows": tuple(header["geometry"]["sliding_windows"])}
    if ModelGeometry(**saved) != geometry:
        raise ValueError(f"{path} belongs to another model: it holds {ModelGeometry(**saved)}, config is {geometry}")
    cache = cls(config, budget=None, key_basis=False)
    quant = header["quant"] | {"tiers": tuple(header["quant"]["tiers"])}
    policy = get_policy(header["policy"]).for_model(config)
    try:
        basis, basis_of = _basis(tensors.get("key_basis"), policy, config)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    held = CacheConfig(
        budget=Budget(**header["budget"]),
        policy=policy,
        quant=QuantSpec(**quant),
        num_sinks=header["num_sinks"],
        min_tokens=header.get("min_tokens", 0),  # files of before have no floor
        window=header["window"],
        scope=header["scope"],
        precision=header.get("precision", "auto"),
        geometry=geometry,
        inv_freq=cache.smartkv_config.inv_freq,
        turn_freq=cache.smartkv_config.turn_freq,
        key_basis=basis,
    )
    cache.configure(held, basis_of)
    for i, (layer, fields) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        if fields is not None:
            prefix = f"{i}."
            _restore(layer, fields, {k[len(prefix) :]: x for k, x in tensors.items() if k.startswith(prefix)})
    return cache


def _basis(packed: torch.Tensor | None, policy: Policy, config: Any) -> tuple[KeyBasis | None, Gates | None]:
    """The basis in a file, and the gates that it came with where they are at hand: all caches share theirs."""
    if packed is None:
        return None, None
    facts, found = ModelGeometry.from_config(config), find_key_basis(True, policy, config)
    wanted = (facts.num_layers, facts.num_kv_heads, facts.head_dim + 1, facts.head_dim)
    if packed.shape != wanted:
        raise ValueError(f"key_basis must be {wanted}; got {tuple(packed.shape)}")
    read = KeyBasis(packed)
    if found is not None and found.basis is not None and torch.equal(found.basis.packed, read.packed):
        return found.basis, found
    return read, None


def _restore(layer: SmartKVLayer, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in _LAYER_FIELDS:
        setattr(layer, name, fields[name])
    layer.record_past = fields["recording"]
    layer.query_keep = fields.get("query_keep", layer.config.policy.decode_queries)  # older files do not say
    k = tensors["window.k"]
    batch, heads, _, head_dim = k.shape
    layer.dtype, layer.device = k.dtype, k.device
    layer.window = DenseWindow(layer.config.buffers, (batch, heads, 0, head_dim), k.dtype, k.device)
    layer.window.buffers = {name[7:]: x for name, x in tensors.items() if name.startswith("window.")}
    layer.window.positions = tensors["window_positions"]
    layer.window.used, layer.window.sink_slots = fields["used"], fields["sink_slots"]
    layer.store = PagedStore(layer.config.quant, batch, heads, head_dim, k.dtype, k.device)
    layer.store.load_tensors(tensors)
    layer.meter = AttentionMeter(layer.config.policy, layer.store)
    layer.meter.sums = {name: tensors[f"meter.{name}"] for name in layer.meter.names}
    layer.row_tokens, layer.queries = tensors["row_tokens"], tensors.get("queries")
    layer.state = {name[6:]: x for name, x in tensors.items() if name.startswith("state.")}
    layer.is_initialized = True
