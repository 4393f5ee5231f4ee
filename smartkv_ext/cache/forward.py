"""The forward that is running: which cache it was given, and whether what it handed over has arrived."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import SmartKVCache


@dataclass
class Forward:
    """One call of a patched model with a SmartKVCache."""

    cache: SmartKVCache
    start: int  # tokens that the cache had seen before
    waiting: bool = False  # a layer's update() has run, and its attention has not come yet
    arrived: bool = False  # some layer's attention has come
    finished: bool = False  # the model has returned


# Per thread and task: a server may run one model in several threads, each with its own cache.
running: ContextVar[Forward | None] = ContextVar("smartkv_forward", default=None)
