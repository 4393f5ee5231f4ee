"""Integration into stock transformers models."""

from .patching import PatchHandle, patch
from .replay import ReplayedDecoder

__all__ = ["PatchHandle", "ReplayedDecoder", "patch"]
