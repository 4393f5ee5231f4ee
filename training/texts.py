"""Texts to learn from: files, folders, exercises and Python's own library, split by document.

A source is a text file, a .jsonl file (every line an exercise, a document of its own), a folder of either, or "stdlib":
the modules and the language reference of the running Python, there without a download. A document belongs to one split.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FIELDS = (("problem", "solution"), ("question", "answer"))  # of the JSONL files that hold exercises
SPLITS = ("train", "valid")
CHARS_PER_TOKEN = 8  # more than any text needs: what is too long is cut after tokenising
SEPARATOR = "\n\n"


def read_text(source: str) -> str:
    """The text of "FILE" or of a part of it, "FILE@0.5-1". A .jsonl file gives its exercises with their solutions.

    Raises ValueError for a source that cannot be read so.
    """
    name, _, part = source.partition("@")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"text file {name!r} does not exist")
    text = SEPARATOR.join(_documents_of(path))
    try:
        begin, end = (float(x) for x in part.split("-")) if part else (0.0, 1.0)
    except ValueError:
        raise ValueError(f"the part of a text must look like 0.5-1; got {part!r}") from None
    return text[int(begin * len(text)) : int(end * len(text))]


def documents(tokenizer: Any, source: str, count: int, length: int) -> list[torch.Tensor]:
    """``count`` pieces (1, length) of a text, at even distances. Raises ValueError if the text is too short."""
    text, pieces = read_text(source), []
    for i in range(count):
        begin = len(text) * i // count
        ids = tokenizer(text[begin : begin + 12 * length], return_tensors="pt").input_ids[:, :length]
        if ids.shape[1] < length:
            raise ValueError(f"{source!r} has too little text for {count} pieces of {length} tokens")
        pieces.append(ids)
    return pieces


@dataclass(frozen=True)
class Source:
    """The documents of one source that belong to a split."""

    name: str
    texts: list[str]

    @classmethod
    def read(cls, name: str, split: str, valid_share: float) -> Source:
        """Raises ValueError for a source that is missing, empty, or too small to be split."""
        found = _standard_library() if name == "stdlib" else _files(Path(name))
        # By hash, not by name: what is added moves few documents, but may move some. At least one is validated on.
        found.sort(key=lambda item: hashlib.sha256(f"{item[0]}\0{len(item[1])}".encode()).digest())
        valid = max(round(valid_share * len(found)), 1)
        if len(found) <= valid:
            raise ValueError(f"source {name!r} must have at least {valid + 1} documents to split; got {len(found)}")
        return cls(name, [text for _, text in (found[:valid] if split == "valid" else found[valid:])])

    def piece(self, rng: random.Random, chars: int) -> str:
        """``chars`` characters from a random place on, with the next documents appended where one ends."""
        sizes = [len(text) for text in self.texts]
        i = rng.choices(range(len(sizes)), weights=sizes)[0]
        text = self.texts[i][rng.randrange(max(sizes[i] - chars, 1)) :]
        while len(text) < chars:
            i = (i + 1) % len(sizes)
            text += SEPARATOR + self.texts[i]
        return text[:chars]


@dataclass(frozen=True)
class Mixture:
    """Sources of one split with their weights."""

    sources: list[Source]
    weights: list[float]

    @classmethod
    def read(cls, weights: Mapping[str, float], split: str, valid_share: float = 0.1) -> Mixture:
        return cls([Source.read(name, split, valid_share) for name in weights], list(weights.values()))

    def piece(self, tokenizer: Any, seed: str, length: int) -> torch.Tensor:
        """(length,) token ids; the same seed gives the same piece. Raises ValueError where a piece comes out short."""
        rng = random.Random(seed)
        source = rng.choices(self.sources, self.weights)[0]
        text = source.piece(rng, CHARS_PER_TOKEN * length)
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[0, :length]
        if ids.shape[0] < length:
            raise ValueError(f"{source.name!r} gave {ids.shape[0]} tokens where {length} are wanted")
        return ids


def _files(path: Path) -> list[tuple[str, str]]:
    """(name, text) of every document."""
    if not path.exists():
        raise ValueError(f"source {str(path)!r} does not exist: name a file, a folder, or stdlib")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl")) if path.is_dir() else [path]
    found = [(f"{file.name}/{i}", text) for file in files for i, text in enumerate(_documents_of(file))]
    if not found:
        raise ValueError(f"source {str(path)!r} must hold .txt, .md or .jsonl files")
    return found


def _documents_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [text]
    return [_exercise(json.loads(line), path.name) for line in text.splitlines() if line.strip()]


def _exercise(entry: dict[str, Any], name: str) -> str:
    for fields in FIELDS:
        if all(field in entry for field in fields):
            return "\n".join(str(entry[field]) for field in fields)
    raise ValueError(f"{name!r} must hold exercises with {' or '.join(' and '.join(f) for f in FIELDS)}")


def _standard_library() -> list[tuple[str, str]]:
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [p for p in sorted(folder.glob("*.py")) if 4_000 < p.stat().st_size < 200_000]
    found = [(p.name, p.read_text(encoding="utf-8", errors="replace")) for p in modules]
    return found + [(f"topic/{name}", text) for name, text in sorted(pydoc_data.topics.topics.items())]
