"""Evolutionary search for a scorer: readable expressions over token features that lose little of the attention to come.

python -m training.evolve --journal evolve.jsonl --export champion.json              synthetic patterns
python -m training.evolve --samples FOLDER --journal real.jsonl --export real.json   traces of bench.real_eviction

Traces that were saved with --gates have the gate's score as one more feature.

A child is accepted if it beats its first parent on TRAIN, and then on VALID too. TEST is looked at once, at the end.
The same seed and data give the same search; a journal goes on after its last finished generation.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.output import show
from smartkv_ext.policies.expression import parse
from smartkv_ext.policies.features import FEATURES, GATE

from .grammar import Grammar, size
from .journal import Candidate, Journal
from .samples import Samples
from .synthetic import SPLITS, digest, generate_traces

SEEDS = {
    "layer_aware": (
        "(0.7 - 0.2 * layer) * recent"
        " + (0.3 + 0.2 * layer) * cumulative * ((position + 1) / seq_len) ** (0.25 + 0.1 * layer)"
        " + (0.15 + 0.1 * layer) * max(0, 1 - age / 128) - 0.1 * min(key_norm, 2)"
    ),
    "hybrid": "0.6 * recent + 0.4 * cumulative * ((position + 1) / seq_len) ** 0.3 + max(0, 1 - age / 128)",
    "h2o": "cumulative",
    "recent": "recent",
}
GATE_SEEDS = {"gate": "gate", "aged gate": "gate - log(1 + age / 64)"}
POPULATION = 48
PARSIMONY = 2e-5  # error that a node must be worth
TOURNAMENT = 3


class Search:
    """A population, its journal, and the two splits that it may look at."""

    def __init__(self, train: Samples, valid: Samples, journal: Journal, seed: int, window: int) -> None:
        self.train, self.valid, self.journal = train, valid, journal
        self.seed, self.window = seed, window
        self.grammar, self.seeds = Grammar(train.names), seeds(train.names)
        self.population = journal.population()
        self.tried = {c.expression for c in journal.candidates}

    def run(self, generations: int, children: int, report: Callable[[dict[str, Any]], None]) -> None:
        """Go on until ``generations`` are finished; the first one tries the seeds and random expressions."""
        for generation in range(len(self.journal.populations), generations):
            rng = random.Random(f"{self.seed}/{generation}")  # so that resuming needs no saved state
            if generation == 0:
                self._begin(rng)
            else:
                for _ in range(children):
                    self._child(generation, rng)
            self.population = self._best()
            self.journal.end_generation(self.population)
            report(self.journal.table()[-1])

    def cost(self, candidate: Candidate) -> tuple[float, int]:
        """TRAIN error, and what the expression's length costs; ties go to the older."""
        return candidate.train + PARSIMONY * size(parse(candidate.expression, self.grammar.names)), candidate.id

    def _best(self) -> list[Candidate]:
        """The next population: least cost first, one expression per TRAIN error, as twins would crowd out the rest."""
        distinct: dict[float, Candidate] = {}
        for candidate in sorted(self.population, key=self.cost):
            distinct.setdefault(round(candidate.train, 7), candidate)
        return list(distinct.values())[:POPULATION]

    def _begin(self, rng: random.Random) -> None:
        texts = list(self.seeds.items())
        while len(texts) < POPULATION:
            text = self.grammar.tidy(self.grammar.random_tree(rng))
            if text is not None:
                texts.append(("random", text))
        for kind, text in texts:
            if text not in self.tried:
                candidate = self._try(0, kind, [], text)
                candidate.valid = self._error(self.valid, text)
                candidate.accepted = True
                self._keep(candidate)

    def _child(self, generation: int, rng: random.Random) -> None:
        parent, other = self._select(rng), self._select(rng)
        if rng.random() < 0.25 and other is not parent:
            kind, tree, parents = "cross", self.grammar.cross(parent.expression, other.expression, rng), [parent, other]
        else:
            kind, tree = self.grammar.mutate(parent.expression, rng)
            parents = [parent]
        text = self.grammar.tidy(tree)
        if text is None or text in self.tried:
            return
        candidate = self._try(generation, kind, [p.id for p in parents], text)
        if self.cost(candidate)[0] < self.cost(parent)[0]:
            candidate.valid = self._error(self.valid, text)
            assert parent.valid is not None, "members of the population were checked"
            candidate.accepted = candidate.valid < parent.valid
        self._keep(candidate)

    def _select(self, rng: random.Random) -> Candidate:
        return min(rng.sample(self.population, min(TOURNAMENT, len(self.population))), key=self.cost)

    def _error(self, samples: Samples, text: str) -> float:
        return samples.error(parse(text, self.grammar.names), self.window)

    def _try(self, generation: int, kind: str, parents: list[int], text: str) -> Candidate:
        self.tried.add(text)
        return Candidate(len(self.journal.candidates), generation, kind, parents, text, self._error(self.train, text))

    def _keep(self, candidate: Candidate) -> None:
        self.journal.add(candidate)
        if candidate.accepted:
            self.population.append(candidate)


def seeds(names: Sequence[str]) -> dict[str, str]:
    """What a search over these features begins with."""
    return SEEDS | GATE_SEEDS if GATE in names else SEEDS


def main(
    journal: Annotated[Path, typer.Option(help="what was tried, one JSON object per line; resumed if it exists")],
    samples: Annotated[Path | None, typer.Option(help="folder of bench.real_eviction --save-samples")] = None,
    export: Annotated[Path | None, typer.Option(help="write the champion as a policy file")] = None,
    generations: Annotated[int, typer.Option(min=1)] = 100,
    children: Annotated[int, typer.Option(min=1, help="expressions that a generation tries")] = 80,
    seed: int = 0,
    window: Annotated[int, typer.Option(min=0, help="newest tokens that are kept in any case")] = 4,
) -> None:
    """Search, or go on searching; print the table of generations and TEST; last line JSON."""
    start = time.perf_counter()
    try:
        source = {name: _identity(samples, name) for name in SPLITS}
        names = source["train"]["features"]
        if any(x["features"] != names for x in source.values()):
            raise ValueError(f"{samples}: train, valid and test must have the same features (--gates or not)")
        settings = {
            "seed": seed, "children": children, "window": window, "population": POPULATION, "parsimony": PARSIMONY,
            "seeds": seeds(names), "data": source,
        }  # fmt: skip
        book = Journal(journal, settings)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if book.test is None:
        _search(book, seed, window, generations, children, samples)
    else:
        typer.echo(f"{journal} has seen TEST: this search is over", err=True)
    if export:
        export.write_text(json.dumps({"name": "evolved", "expression": book.champion().expression}, indent=2) + "\n")
    _conclude(book, time.perf_counter() - start)


def _search(book: Journal, seed: int, window: int, generations: int, children: int, folder: Path | None) -> None:
    """Finish the search of a journal."""

    def split(name: str) -> Samples:
        return Samples.load(folder / f"{name}.safetensors") if folder else Samples.of_traces(generate_traces(name))

    search = Search(split("train"), split("valid"), book, seed, window)
    search.run(generations, children, _report)
    test = split("test")
    texts = {"champion": book.champion().expression} | search.seeds
    book.end({name: test.error(parse(text, search.grammar.names), window) for name, text in texts.items()})


def _identity(folder: Path | None, split: str) -> dict[str, Any]:
    """What identifies the data of a split without looking at any error on it."""
    if folder is None:
        return {"sha256": digest(split), "features": sorted(FEATURES)}
    return Samples.identity(folder / f"{split}.safetensors")


def _report(row: dict[str, Any]) -> None:
    typer.echo(" ".join(f"{k} {v:.5f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), err=True)


def _conclude(book: Journal, seconds: float) -> None:
    rows = book.table()
    last = {key: rows[-1][key] for key in ("best train", "best valid", "expression")}
    assert book.test is not None
    errors = [{"scorer": name, "test error": error} for name, error in book.test.items()]
    show("generations", [{k: v for k, v in row.items() if k != "expression"} for row in rows], {"generations": rows})
    show("TEST", errors, {"seconds": seconds, "test": book.test, "tried": len(book.candidates)} | last)


if __name__ == "__main__":
    typer.run(main)
