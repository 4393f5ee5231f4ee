"""Real models and real text for the end-to-end benchmarks."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from smartkv_ext.cli.models import DTYPES, load_model


def load(name: str, dtype: str, device: str = "cpu") -> tuple[Any, Any]:
    """(model on the device, tokenizer) by folder, hub id or "smollm2"; "random": the shape of Qwen2.5-1.5B, where there
    are no models and only times and bytes mean something."""
    if name == "random":
        with torch.device(device):  # drawing 1.5 billion numbers takes a CPU half a minute
            return random_model(torch.bfloat16 if dtype == "auto" else DTYPES[dtype]), letters
    model, tokenizer = load_model(name, dtype)
    return model.eval().to(device), tokenizer


def random_model(dtype: torch.dtype) -> Any:
    """28 layers, 12 query and 2 KV heads of 128."""
    config = Qwen2Config(
        vocab_size=32000, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=1 << 17,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def letters(text: str, return_tensors: str) -> SimpleNamespace:
    """A token per character."""
    return SimpleNamespace(input_ids=torch.tensor([[ord(x) % 32000 for x in text]]))


def text_ids(tokenizer: Any, length: int, path: Path | None = None) -> torch.Tensor:
    """(1, length) token ids of a text file, or of the language reference that every CPython carries."""
    text = path.read_text() if path else "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer(text[: 12 * length], return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, {length} are needed")
    return ids
