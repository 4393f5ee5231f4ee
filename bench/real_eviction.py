"""Attention reconstruction error of every policy on traces of a real model, and the samples that the search needs.

python -m bench.real_eviction --test BOOK.txt --test EXERCISES.jsonl
python -m bench.real_eviction --train A.txt --valid B.txt --test C.txt --save-samples FOLDER    for training.evolve
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.models import load
from bench.output import show
from bench.synthetic_eviction import candidates, mean
from smartkv_ext.gates import Gates, ModelFacts, shipped_gates
from smartkv_ext.policies import Policy, get_policy
from training.reconstruction import RETENTIONS, Trace, reconstruction_errors
from training.samples import Samples
from training.texts import documents
from training.traces import collect

Texts = Annotated[
    list[str], typer.Option(help="text file, or .jsonl of exercises; FILE@0.5-1 is a part of it; may be repeated")
]


def kind(source: str) -> str:
    """Exercises or books."""
    return "math" if source.partition("@")[0].endswith(".jsonl") else "books"


def find_gates(name: str | None, config: Any) -> Gates | None:
    """Gates by name: "shipped", a folder, a hub id."""
    if name is None:
        return None
    return shipped_gates(ModelFacts.from_config(config)) if name == "shipped" else Gates.from_pretrained(name)


class Table:
    """Errors of every policy, collected document by document: traces are large."""

    def __init__(self, policies: dict[str, Policy], window: int) -> None:
        self.policies, self.window = policies, window
        self.errors: dict[tuple[str, str, bool], list[list[float]]] = {}

    def add(self, group: str, traces: list[Trace]) -> None:
        for name, policy in self.policies.items():
            for shared in (False, True):
                errors = reconstruction_errors(policy, traces, window=self.window, shared=shared)
                self.errors.setdefault((name, group, shared), []).append(errors)

    def rows(self) -> list[dict[str, Any]]:
        """Mean over documents: each group, each retention, and with competing heads."""
        groups = sorted({group for _, group, _ in self.errors})
        rows = []
        for name in self.policies:
            each = {g: torch.tensor(self.errors[name, g, False]) for g in groups}
            everything = torch.cat(list(each.values())).mean(0)
            row: dict[str, Any] = {"policy": name} | {g: x.mean().item() for g, x in each.items()}
            row |= {f"{100 * r:.0f} %": x for r, x in zip(RETENTIONS, everything.tolist(), strict=True)}
            row["mean"] = everything.mean().item()
            row["heads compete"] = mean([mean(x) for g in groups for x in self.errors[name, g, True]])
            rows.append(row)
        return sorted(rows, key=lambda row: row["mean"])


def pieces(tokenizer: Any, sources: list[str], per_file: int, length: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, ids) of every document."""
    for source in sources:
        for ids in documents(tokenizer, source, per_file, length):
            yield kind(source), ids


def join(parts: list[Samples]) -> Samples:
    """Samples of several documents: one batch."""
    features = {
        name: x if x.shape[1] == 1 and x.shape[3] == 1 else torch.cat([part.features[name] for part in parts], 1)
        for name, x in parts[0].features.items()
    }
    return Samples(features, torch.cat([part.future for part in parts], 1))


def main(
    model: str = "smollm2",
    dtype: str = "float32",
    train: Texts = [],  # noqa: B006  # typer reads the default and never changes it
    valid: Texts = [],  # noqa: B006
    test: Texts = [],  # noqa: B006
    per_file: Annotated[int, typer.Option(help="documents cut from each text")] = 2,
    tokens: Annotated[int, typer.Option(help="seen before eviction")] = 1024,
    future: Annotated[int, typer.Option(help="queries that judge it")] = 256,
    window: Annotated[int, typer.Option(help="newest tokens, kept in any case")] = 32,
    policy: Annotated[list[str], typer.Option(help="further policy files")] = [],  # noqa: B006
    gates: Annotated[str | None, typer.Option(help='gates to measure too: "shipped", a folder or a hub id')] = None,
    save_samples: Annotated[Path | None, typer.Option(help="folder for the search; TEST's errors stay unseen")] = None,
) -> None:
    """Print the table of the --test texts, unless samples are saved; last line JSON."""
    start = time.perf_counter()
    if not (train or valid or test if save_samples else test):
        raise typer.BadParameter("give --test TEXT to measure, or --train, --valid and --test with --save-samples")
    network, tokenizer = load(model, dtype)
    learned = find_gates(gates, network.config)
    further = {Path(name).stem: get_policy(name) for name in policy}
    if learned is None and (asking := [name for name, x in further.items() if x.scores_keys]):
        raise typer.BadParameter(f"{', '.join(asking)}: policies that ask gates need --gates")
    if save_samples:
        save_samples.mkdir(parents=True, exist_ok=True)
        for name, sources in (("train", train), ("valid", valid), ("test", test)):
            found = [
                Samples.of_traces(collect(network, ids, tokens, learned))
                for _, ids in pieces(tokenizer, sources, per_file, tokens + future)
            ]
            if found:
                join(found).save(save_samples / f"{name}.safetensors")
                typer.echo(f"{name}: {len(found)} documents, {time.perf_counter() - start:.0f} s", err=True)
        return
    chosen = candidates() | {name: x.for_model(network.config) for name, x in further.items()}
    if learned is not None:
        chosen |= {f"gate, recency {r:.0f}": get_policy("gate", gates=learned, recency=r) for r in (0.0, 1.0)}
    table = Table(chosen, window)
    for group, ids in pieces(tokenizer, test, per_file, tokens + future):
        table.add(group, collect(network, ids, tokens, learned))
        typer.echo(f"{group}: {time.perf_counter() - start:.0f} s", err=True)
    rows = table.rows()
    seconds = time.perf_counter() - start
    title = f"{Path(model).name} {dtype}: attention reconstruction error, {tokens} tokens judged by {future} queries"
    show(title, rows, {"tokens": tokens, "future": future, "window": window, "seconds": seconds, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
