"""SmartKV: a key-value cache that is small for real. See README.md."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import cache, eval, gates, hf, ops, policies, quant, reference
    from .cache import CacheReport, SmartKVCache
    from .hf import PatchHandle, ReplayedDecoder, cache_kwargs, patch, unpatch

# Names and where they are. transformers takes seconds to import: whoever wants only the ops does not pay for it.
_HOMES = {
    "SmartKVCache": "cache", "CacheReport": "cache", "patch": "hf", "unpatch": "hf", "PatchHandle": "hf",
    "ReplayedDecoder": "hf", "cache_kwargs": "hf",
}  # fmt: skip
_PARTS = ("cache", "eval", "gates", "hf", "ops", "policies", "quant", "reference")

__all__ = [
    "CacheReport", "PatchHandle", "ReplayedDecoder", "SmartKVCache", "cache", "cache_kwargs", "eval", "gates", "hf",
    "ops", "patch", "policies", "quant", "reference", "unpatch",
]  # fmt: skip

try:
    __version__ = version("smartkv-ext")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        if name == "SmartKVCache":
            from .cache import cache

            cache.model_config, cache.prepare_model = _model_config, _prepare_model
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# For ``SmartKVCache(model)``: the front door is the one place that knows the cache and its seat in models.
def _model_config(model: Any) -> Any:
    from .hf import decoder_of

    return decoder_of(model).config


def _prepare_model(model: Any) -> None:
    from .hf import ensure_patched

    ensure_patched(model)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
