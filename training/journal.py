"""The search's journal: one JSON object per line, appended as it happens, enough to go on from the last generation."""

from __future__ import annotations

import json
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
        whole = b""
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break  # the last line of a search that was stopped while it wrote
                raise ValueError(f"{self.path}, line {number}: not a journal of training.evolve ({error})") from None
            if number == 1 and entry.get("settings") != settings:
                raise ValueError(f"{self.path} was written with {entry.get('settings')}; these are {settings}")
            self._take(entry)
            whole += line
        finished = len(self.populations)
        self.candidates = [c for c in self.candidates if c.generation < finished]
        kept = [line for line in whole.splitlines(keepends=True) if self._keeps(json.loads(line), finished)]
        self.path.write_bytes(b"".join(kept))

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

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

    def table(self) -> list[dict[str, Any]]:
        """A row per generation."""
        rows = []
        by_id = {c.id: c for c in self.candidates}
        for generation, ids in enumerate(self.populations):
            tried = [c for c in self.candidates if c.generation == generation]
            best = min((by_id[i] for i in ids), key=lambda c: c.valid if c.valid is not None else 1.0)
            rows.append({
                "generation": generation, "tried": len(tried), "accepted": sum(c.accepted for c in tried),
                "refused on TRAIN": sum(c.valid is None for c in tried),
                "refused on VALID": sum(c.valid is not None and not c.accepted for c in tried),
                "best train": best.train, "best valid": best.valid, "expression": best.expression,
            })  # fmt: skip
        return rows
