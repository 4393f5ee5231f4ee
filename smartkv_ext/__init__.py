"""SmartKV: a key-value cache that is small for real. See README.md."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import CacheReport, SmartKVCache
    from .hf import PatchHandle, ReplayedDecoder, patch

__all__ = ["CacheReport", "PatchHandle", "ReplayedDecoder", "SmartKVCache", "patch"]

try:
    __version__ = version("smartkv-ext")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: whoever wants only the ops does not pay for it.
    if name in ("SmartKVCache", "CacheReport"):
        from . import cache

        return getattr(cache, name)
    if name in ("patch", "PatchHandle", "ReplayedDecoder"):
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
