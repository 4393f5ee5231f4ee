"""The search's journal: one JSON object per line, appended as it happens, enough to go on from the last generation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Candidate:
    """One expression that was tried."""

    id: int
    generation: int
    kind: str  # "seed", "random", "cross" or the mutation
    parents: list[int]
    expression: str
    train: float
    valid: float | None = None  # None: TRAIN had refused it
    accepted: bool = False


class Journal:
    """Raises ValueError for a journal that was written for other settings, or that cannot be read."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.candidates: list[Candidate] = []
        self.populations: list[list[int]] = []  # ids, per finished generation
        self.test: dict[str, float] | None = None
        if path.exists():
            self._read(settings)
        else:
            self._write({"settings": settings})

    def _read(self, settings: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        lines = data.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            cut = lines.pop()  # of a search that was stopped while it wrote
            if not lines and not _line({"settings": settings}).startswith(cut):
                raise ValueError(f"{self.path}, line 1: not a journal of training.evolve")
        lines = lines or [_line({"settings": settings})]
        found = self._entry(1, lines[0]).get("settings")
        if found != settings:
            raise ValueError(f"{self.path} was written with {found}; these are {settings}")
        entries = [self._entry(number, line) for number, line in enumerate(lines, 1)]
        for entry in entries:
            self._take(entry)
        finished = len(self.populations)
        self.candidates = [c for c in self.candidates if c.generation < finished]
        kept = b"".join(line for line, x in zip(lines, entries, strict=True) if self._keeps(x, finished))
        if kept != data:
            whole = self.path.with_name(self.path.name + ".new")
            whole.write_bytes(kept)
            whole.replace(self.path)  # at once: stopped here, the old journal is still there

    def _entry(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path}, line {number}: not a journal of training.evolve")
        return entry

    def _take(self, entry: dict[str, Any]) -> None:
        if "population" in entry:
            self.populations.append(entry["population"])
        elif "test" in entry:
            self.test = entry["test"]
        elif "expression" in entry:
            self.candidates.append(Candidate(**entry))

    @staticmethod
    def _keeps(entry: dict[str, Any], finished: int) -> bool:
        """A generation that was cut short is tried again from its beginning."""
        return "expression" not in entry or entry["generation"] < finished

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_line(entry))

    def add(self, candidate: Candidate) -> None:
        """A candidate has been tried."""
        self.candidates.append(candidate)
        self._write(asdict(candidate))

    def end_generation(self, population: list[Candidate]) -> None:
        """The population that the next generation starts from."""
        self.populations.append([c.id for c in population])
        self._write({"population": self.populations[-1]})

    def end(self, test: dict[str, float]) -> None:
        """TEST has been looked at: this search is over."""
        self.test = test
        self._write({"test": test})

    def population(self) -> list[Candidate]:
        """Members of the last finished generation."""
        by_id = {c.id: c for c in self.candidates}
        return [by_id[i] for i in self.populations[-1]] if self.populations else []

    def champion(self, generation: int = -1) -> Candidate:
        """The member of a finished generation's population with the least VALID error; ties go to the older."""
        members = set(self.populations[generation])
        return min(
            (c for c in self.candidates if c.id in members),
            key=lambda c: (math.inf if c.valid is None else c.valid, c.id),
        )

    def table(self) -> list[dict[str, Any]]:
        """A row per generation."""
        rows = []
        for generation in range(len(self.populations)):
            tried = [c for c in self.candidates if c.generation == generation]
            best = self.champion(generation)
            rows.append({
                "generation": generation, "tried": len(tried), "accepted": sum(c.accepted for c in tried),
                "refused on TRAIN": sum(c.valid is None for c in tried),
                "refused on VALID": sum(c.valid is not None and not c.accepted for c in tried),
                "best train": best.train, "best valid": best.valid, "expression": best.expression,
            })  # fmt: skip
        return rows


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
