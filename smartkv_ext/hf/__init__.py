"""Integration into stock transformers models."""

from .compat import cache_kwargs
from .patching import PatchHandle, decoder_of, ensure_patched, is_patched, patch, unpatch
from .replay import ReplayedDecoder

__all__ = [
    "PatchHandle",
    "ReplayedDecoder",
    "cache_kwargs",
    "decoder_of",
    "ensure_patched",
    "is_patched",
    "patch",
    "unpatch",
]
