"""Integration into stock transformers models."""

from .patch import PatchHandle, patch

__all__ = ["PatchHandle", "patch"]
