"""Real models and real text for the end-to-end benchmarks."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch

from smartkv_ext.cli.models import load_model


def load(name: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) by folder, hub id or "smollm2"."""
    model, tokenizer = load_model(name, dtype)
    return model.eval(), tokenizer


def text_ids(tokenizer: Any, length: int, path: Path | None = None) -> torch.Tensor:
    """(1, length) token ids of a text file, or of the language reference that every CPython carries."""
    text = path.read_text() if path else "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer(text[: 12 * length], return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, {length} are needed")
    return ids
