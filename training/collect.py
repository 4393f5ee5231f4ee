"""Traces of real models: queries, keys and values of every layer, after RoPE, as attention saw them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smartkv_ext.cache.config import inverse_frequencies

from .reconstruction import Trace, make_trace

NAME = "smartkv_trace"
FIELDS = (("problem", "solution"), ("question", "answer"))  # of the JSONL files that hold exercises
_layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []


def _recorded(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    _layers.append((query.detach(), key.detach(), value.detach()))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, _recorded)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def _recording(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _layers.clear()
    try:
        yield _layers
    finally:
        _layers.clear()
        model.set_attn_implementation(previous)


@torch.no_grad()
def collect(model: Any, ids: torch.Tensor, tokens: int) -> list[Trace]:
    """A trace per layer of ids (batch, total): evicted after ``tokens``, judged by the queries of the rest."""
    inv_freq = torch.tensor(inverse_frequencies(model.config))
    with _recording(model) as layers:
        model.base_model(ids, use_cache=False)
        scale = layers[0][0].shape[-1] ** -0.5
        return [
            make_trace(q, k, v, tokens, i, len(layers), scale, inv_freq) for i, (q, k, v) in enumerate(list(layers))
        ]


def read_text(source: str) -> str:
    """The text of "FILE" or of a part of it, "FILE@0.5-1". A .jsonl file gives its exercises with their solutions.

    Raises ValueError for a source that cannot be read so.
    """
    name, _, part = source.partition("@")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"text file {name!r} does not exist")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "\n\n".join(_exercise(json.loads(line), name) for line in text.splitlines())
    try:
        begin, end = (float(x) for x in part.split("-")) if part else (0.0, 1.0)
    except ValueError:
        raise ValueError(f"the part of a text must look like 0.5-1; got {part!r}") from None
    return text[int(begin * len(text)) : int(end * len(text))]


def _exercise(entry: dict[str, Any], name: str) -> str:
    for fields in FIELDS:
        if all(field in entry for field in fields):
            return "\n".join(str(entry[field]) for field in fields)
    raise ValueError(f"{name!r} must hold exercises with {' or '.join(' and '.join(f) for f in FIELDS)}")


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
