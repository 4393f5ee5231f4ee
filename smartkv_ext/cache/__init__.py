"""The compressed cache: dense window, paged store, compression and exact accounting."""

from .cache import SmartKVCache
from .report import CacheReport

__all__ = ["CacheReport", "SmartKVCache"]
