"""All that differs between the releases of transformers that we support, each with the release at which it may go.

Nothing else in the package asks for a version or knows an old name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from packaging.version import Version

from smartkv_ext.cache import SmartKVCache

OLDEST, NEWEST = "5.17.0", "5.24.0"  # tried: `make compat`
VERSION = Version(transformers.__version__)

# 5.24 renamed the argument of forward and generate, and gives the attention function's keyword arguments to
# Cache.update. When 5.24 is the oldest: "cache" is its name everywhere, and the last lines of _before_attention can go.
_RENAMED = Version("5.24.0.dev0") <= VERSION
CACHE_ARGUMENT = "cache" if _RENAMED else "past_key_values"
UPDATE_GETS_KWARGS = _RENAMED


def cache_kwargs(cache: Any) -> dict[str, Any]:
    """Keyword arguments that give ``cache`` to a forward or to generate, by the name that this release has for it."""
    return {CACHE_ARGUMENT: cache}


def find_cache(args: Iterable[Any], kwargs: Mapping[str, Any]) -> SmartKVCache | None:
    """The SmartKVCache among a call's arguments, whatever it is called: names have changed and will again."""
    for value in kwargs.values():
        if isinstance(value, SmartKVCache):
            return value
    return next((value for value in args if isinstance(value, SmartKVCache)), None)


def is_continuous_batching(kwargs: Mapping[str, Any]) -> bool:
    """Whether an attention function's keyword arguments are those of ``generate_batch``: below 5.24 its paged cache,
    from then on indices into it.
    """
    return any(kwargs.get(name) is not None for name in ("cache", "read_index", "block_table"))


def tried() -> str:
    """For messages: this release, and those that the tests ran with."""
    return f"transformers {transformers.__version__} (tried: {OLDEST} to {NEWEST})"
