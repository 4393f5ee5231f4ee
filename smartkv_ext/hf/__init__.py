"""Integration into stock transformers models."""

from .compat import cache_kwargs
from .patching import PatchHandle, is_patched, patch, unpatch
from .replay import ReplayedDecoder

__all__ = ["PatchHandle", "ReplayedDecoder", "cache_kwargs", "is_patched", "patch", "unpatch"]
