"""Integration into stock transformers models."""

from .patching import PatchHandle, patch

__all__ = ["PatchHandle", "patch"]
