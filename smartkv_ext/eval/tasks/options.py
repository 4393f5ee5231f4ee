"""What tasks are made from."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class TaskOptions:
    """``data`` is a folder; tasks say which files they look for. ``lengths`` are tokens of a document."""

    tokenizer: Any
    data: Path | None = None
    texts: tuple[str, ...] = ()  # files "FILE" or "FILE@0.5": from the middle on; none: Python's language reference
    lengths: tuple[int, ...] = (2048,)
    samples: int = 1
    scored: int = 256  # tokens that follow a text
    seed: int = 42
    subtasks: tuple[str, ...] = ()  # of RULER or LongBench; none: all

    def file(self, *names: str) -> Path:
        """The first of these files in the data folder. Raises ValueError where it has none of them."""
        if self.data is None:
            raise ValueError(f"data must be a folder with {' or '.join(names)}; none was given")
        for name in names:
            if (self.data / name).exists():
                return self.data / name
        raise ValueError(f"data folder {str(self.data)!r} has no {' or '.join(names)}")

    def sources(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each chosen text."""
        if not self.texts:
            yield "reference", language_reference()
        for source in self.texts:
            yield Path(source.partition("@")[0]).stem, read_text(source)


def language_reference() -> str:
    """The language reference that every CPython carries."""
    return "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))


def read_text(source: str) -> str:
    """Text of "FILE" or "FILE@0.5", from that share on. A .jsonl file gives its "text" fields.

    Raises ValueError for a source that cannot be read so.
    """
    name, _, part = source.partition("@")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"text file {name!r} does not exist")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    try:
        begin = float(part or 0)
    except ValueError:
        raise ValueError(f"the part of a text must look like 0.5; got {part!r}") from None
    return text[int(begin * len(text)) :]


def first_tokens(tokenizer: Any, text: str, count: int, name: str) -> torch.Tensor:
    """(1, count) ids from the beginning of a text. Raises ValueError if it is too short."""
    ids: torch.Tensor = tokenizer(text[: 12 * count], return_tensors="pt").input_ids[:, :count]
    if ids.shape[1] < count:
        raise ValueError(f"text {name!r} has {ids.shape[1]} tokens, {count} are needed")
    return ids
