"""An oracle beside the policies: it keeps the tokens that the tokens to come attend to. Rows as those of bench.quality.

python -m bench.oracle --out rows.jsonl --text NOVEL.txt@0.5 --length 4096

It reads the continuation, or all questions with their answers one after another, so no method can do what it does; it
is not the best there can be either: a head's attention is not its effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.cache_utils import Cache

import smartkv_ext
from bench.models import load
from bench.surrogate import Table
from smartkv_ext import SmartKVCache, ops
from smartkv_ext.eval.items import Document
from smartkv_ext.eval.methods import Method, smartkv_arguments
from smartkv_ext.eval.prompt import split_prompt, tokenize
from smartkv_ext.eval.recording import Recording, record, replay
from smartkv_ext.eval.runner import Results, Settings, evaluate
from smartkv_ext.eval.tasks import TaskOptions, get_documents
from smartkv_ext.hf.gate_check import sketch_of

Key = tuple[int, ...]  # the ids of a document


@dataclass(frozen=True)
class Oracle(Method):
    """``future``: the ids (1, m) that follow each document; ``tables``: their attention, as far as it is known."""

    future: Mapping[Key, torch.Tensor] = field(default_factory=dict, compare=False)
    tables: dict[Key, torch.Tensor] = field(default_factory=dict, compare=False)

    def prefill(self, model: Any, recording: Recording) -> Cache:
        key = tuple(recording.ids[0].tolist())
        if key not in self.tables:
            self.tables[key] = future_attention(model, recording.ids, self.future[key])
        arguments = smartkv_arguments(self.options) | {"policy": Table(self.tables[key])}
        cache = SmartKVCache(model.config, **arguments)
        cache.check_keys(lambda: sketch_of(model))  # as the forward that is replayed did
        replay(recording, cache)
        return cache


def future_attention(model: Any, ids: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """(num_layers, num_kv_heads, n) float32: attention that each of ids (1, n) receives from rest (1, m), summed over
    queries and the query group. ``model`` is patched.
    """
    whole, n = record(model, torch.cat([ids, rest], 1)), ids.shape[1]
    positions = torch.arange(n + rest.shape[1], dtype=torch.int32)[None]
    mass = [
        ops.attention_mass(x.q[:, :, n:].contiguous(), x.k.contiguous(), positions, n, whole.softmax_scale)
        for x in whole.layers
    ]
    return torch.stack([x[0, :, :n] for x in mass])


def futures(tokenizer: Any, documents: list[Document]) -> dict[Key, torch.Tensor]:
    """What follows each document: its continuation, or its questions with their answers."""
    out: dict[Key, torch.Tensor] = {}
    for document in documents:
        if document.ids is not None and document.continuation is not None:
            out[tuple(document.ids[0].tolist())] = document.continuation
        rest: list[torch.Tensor] = []
        for q in document.questions:
            prompt = split_prompt(tokenizer, document.context, q.text, q.answer_prefix, document.chat)
            rest += [prompt.question, tokenize(tokenizer, q.answers[0])]
            out[tuple(prompt.document[0].tolist())] = torch.cat(rest, 1)
    return out


def main(
    out: Annotated[Path, typer.Option(help="JSONL file")],
    model: str = "smollm2",
    dtype: str = "bfloat16",
    budget: list[str] = ["0.25", "0.125", "0.0625"],  # noqa: B006
    tiers: Annotated[list[str], typer.Option(help="such as 16 or K3V2,4,16")] = ["16", "K3V2,K4V3,4,8,16"],  # noqa: B006
    task: list[str] = ["text", "recall"],  # noqa: B006
    text: Annotated[list[str], typer.Option(help="FILE or FILE@0.5")] = [],  # noqa: B006
    length: list[int] = [2048],  # noqa: B006
    samples: int = 1,
) -> None:
    """Write rows; a run that was stopped continues."""
    network, tokenizer = load(model, dtype)
    options = TaskOptions(tokenizer, texts=tuple(text), lengths=tuple(length), samples=samples)
    documents = list(get_documents(task, options))
    future = futures(tokenizer, documents)
    tables: dict[Key, torch.Tensor] = {}
    methods = [Oracle("oracle", {"budget": b, "tiers": t}, future, tables) for b in budget for t in tiers]
    settings = Settings(Path(model).name, dtype, query_aware=False)
    with torch.no_grad(), smartkv_ext.patch(network):
        evaluate(
            network, tokenizer, documents, methods, Results(out), settings, lambda line: typer.echo(line, err=True)
        )


if __name__ == "__main__":
    typer.run(main)
