"""Texts to learn from: files, folders, exercises, data sets of the hub and Python's own library, split by document.

A source is one of

* a text file; a .jsonl file, every line a document of its own (an exercise with its solution, or a text); a folder of
  either, where .jsonl files with anything else are skipped;
* "hub:OWNER/NAME" or "hub:OWNER/NAME:CONFIG": the first documents of a data set's train split (training/hub.py);
* "stdlib": the modules and the language reference of the running Python, there without a download.

A document belongs to one split, which its own text decides: documents that are added move no other. Only a source
that would have none in the valid split gives it the one that comes nearest.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import random
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .hub import HUB, hub_rows

FIELDS = (("problem", "solution"), ("question", "answer"), ("text",), ("context",))  # of rows that are documents
SPLITS = ("train", "valid")
CHARS_PER_TOKEN = 8  # more than any text needs: what is too long is cut after tokenising
SEPARATOR = "\n\n"
BUNDLE = 4  # documents too short for a piece are joined until they are as long as so many pieces


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
class Document:
    """A text, or several short ones in a row."""

    name: str
    text: str

    @property
    def number(self) -> int:
        """From 0 to 2 ** 63 - 1, decided by the text."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "big") >> 1

    def held_out(self, share: float) -> bool:
        """Whether it belongs to the valid split."""
        return self.number < share * 2**63


@dataclass(frozen=True)
class Source:
    """The documents of one source that belong to a split."""

    name: str
    documents: list[Document]

    @classmethod
    def read(cls, name: str, split: str, valid_share: float) -> Source:
        """Raises ValueError for a source that is missing, empty, or too small to be split."""
        found = sorted(_documents(name), key=lambda document: document.number)
        valid = max(sum(document.held_out(valid_share) for document in found), 1)
        if len(found) <= valid and (split == "train" or valid_share < 1):
            raise ValueError(f"source {name!r} must have at least {valid + 1} documents to split; got {len(found)}")
        return cls(name, found[:valid] if split == "valid" else found[valid:])

    def bundled(self, chars: int) -> Source:
        """Documents shorter than ``chars`` in a row, BUNDLE times as long together: no piece leaves its document."""
        long = [document for document in self.documents if len(document.text) >= chars]
        short = [document for document in self.documents if len(document.text) < chars]
        rows: list[list[Document]] = [[]]
        for document in short:
            if sum(len(x.text) for x in rows[-1]) >= BUNDLE * chars:
                rows.append([])
            rows[-1].append(document)
        if len(rows) > 1 and sum(len(x.text) for x in rows[-1]) < chars:
            rows[-2] += rows.pop()
        return Source(self.name, long + [_joined(row) for row in rows if row])

    def piece(self, rng: random.Random, chars: int) -> tuple[str, Document]:
        """``chars`` characters from a random place of a document on, or all of a shorter one."""
        document = rng.choices(self.documents, weights=[len(document.text) for document in self.documents])[0]
        begin = rng.randrange(max(len(document.text) - chars, 0) + 1)
        return document.text[begin : begin + chars], document


def _joined(row: list[Document]) -> Document:
    name = row[0].name if len(row) == 1 else f"{row[0].name} and {len(row) - 1} more"
    return Document(name, SEPARATOR.join(document.text for document in row))


@dataclass(frozen=True)
class Mixture:
    """Sources of one split with their weights."""

    sources: list[Source]
    weights: list[float]

    @classmethod
    def read(cls, weights: Mapping[str, float], split: str, valid_share: float = 0.1) -> Mixture:
        return cls([Source.read(name, split, valid_share) for name in weights], list(weights.values()))

    def bundled(self, length: int) -> Mixture:
        """For pieces of ``length`` tokens."""
        return Mixture([source.bundled(CHARS_PER_TOKEN * length) for source in self.sources], self.weights)

    def piece(self, tokenizer: Any, seed: str, length: int) -> tuple[torch.Tensor, Document]:
        """Token ids (length,) and their document; the same seed gives the same piece.

        Raises ValueError where a piece comes out short.
        """
        rng = random.Random(seed)
        source = rng.choices(self.sources, self.weights)[0]
        text, document = source.piece(rng, CHARS_PER_TOKEN * length)
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[0, :length]
        if ids.shape[0] < length:
            raise ValueError(f"{source.name!r} gave {ids.shape[0]} tokens where {length} are wanted")
        return ids, document

    def digest(self) -> str:
        """SHA-256 of all documents, in whatever order they were found."""
        found = hashlib.sha256()
        for source in self.sources:
            for number in sorted(document.number for document in source.documents):
                found.update(number.to_bytes(8, "big"))
        return found.hexdigest()


def _documents(source: str) -> list[Document]:
    """All documents of a source. Raises ValueError if there are none."""
    if source == "stdlib":
        return [Document(name, text) for name, text in _standard_library()]
    if source.startswith(HUB):
        return [Document(f"{source}/{i}", _content(row, source)) for i, row in enumerate(hub_rows(source))]
    path = Path(source)
    if not path.exists():
        raise ValueError(f"source {source!r} does not exist: name a file, a folder, {HUB}OWNER/NAME, or stdlib")
    if path.is_file():
        return [Document(f"{path.name}/{i}", text) for i, text in enumerate(_documents_of(path))]
    found = []
    for file in sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl")):
        try:
            found += [Document(f"{file.name}/{i}", text) for i, text in enumerate(_documents_of(file))]
        except ValueError as error:
            warnings.warn(f"{error}; it is skipped", stacklevel=2)
    if not found:
        raise ValueError(f"source {source!r} must hold .txt, .md or .jsonl files")
    return found


def _documents_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [text]
    return [_content(json.loads(line), path.name) for line in text.splitlines() if line.strip()]


def _content(row: Any, name: str) -> str:
    """The text of a row. Raises ValueError if it has none."""
    for fields in FIELDS:
        if isinstance(row, dict) and all(field in row for field in fields):
            return "\n".join(str(row[field]) for field in fields)
    wanted = " or ".join(" and ".join(fields) for fields in FIELDS)
    raise ValueError(f"{name!r} must hold exercises or texts with {wanted}")


def _standard_library() -> list[tuple[str, str]]:
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [p for p in sorted(folder.glob("*.py")) if 4_000 < p.stat().st_size < 200_000]
    found = [(p.name, p.read_text(encoding="utf-8", errors="replace")) for p in modules]
    return found + [(f"topic/{name}", text) for name, text in sorted(pydoc_data.topics.topics.items())]
