"""The forward that is running: which cache it was given, and whether what it handed over has arrived."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import SmartKVCache


class Forward:
    """One call of a patched decoder with a SmartKVCache. Holds both weakly: behind an interrupt nothing ends it."""

    def __init__(self, decoder: Any, cache: SmartKVCache, start: int) -> None:
        self._decoder, self._cache = weakref.ref(decoder), weakref.ref(cache)
        self.start = start  # tokens that the cache had seen before
        self.waiting = False  # a layer's update() has run, and its attention has not come yet
        self.arrived = False  # some layer's attention has come
        self.finished = False  # the decoder has returned
        self.pre_rope: Any = None  # the keys before RoPE that the layer at work asks for

    @property
    def cache(self) -> SmartKVCache | None:
        """None: it is gone, and the forward long over."""
        return self._cache()

    @property
    def decoder(self) -> Any:
        """The patched module, None where it is gone."""
        return self._decoder()


# Per thread and task: a server may run one model in several threads, each with its own cache.
running: ContextVar[Forward | None] = ContextVar("smartkv_forward", default=None)
