"""Data sets of the Hugging Face hub as sources of text; they need the package ``datasets`` and a network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

HUB = "hub:"
MOST_ROWS = 10_000
MOST_CHARS = 64_000_000  # PG-19's train split alone has 11 GB


def hub_rows(source: str) -> Iterator[dict[str, Any]]:
    """Rows of "hub:OWNER/NAME" or "hub:OWNER/NAME:CONFIG", from the start of its train split, which is streamed.

    Raises ValueError without the package, and where the data set cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"source {source!r} needs the package datasets: pip install datasets") from error
    name, _, config = source.removeprefix(HUB).partition(":")
    chars = 0
    try:
        for row in islice(load_dataset(name, config or None, split="train", streaming=True), MOST_ROWS):
            yield row
            chars += sum(len(value) for value in row.values() if isinstance(value, str))
            if chars >= MOST_CHARS:
                return
    except Exception as error:  # of the network, the hub and every file format that there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"source {source!r} cannot be read from the hub: {reason}") from error
