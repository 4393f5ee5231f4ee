"""Perplexity, KL and top-1 agreement on the tokens that truly follow a compressed text."""

from __future__ import annotations

from collections.abc import Iterator

from smartkv_ext.eval.items import Document

from .options import TaskOptions, first_tokens


def text(options: TaskOptions) -> Iterator[Document]:
    """Each text at each length; loss is counted after compression only."""
    for name, content in options.sources():
        for length in options.lengths:
            ids = first_tokens(options.tokenizer, content, length + options.scored, name)
            yield Document(
                task="text", name=f"{name}/{length}+{options.scored}", ids=ids[:, :length],
                continuation=ids[:, length:], facts={"length": length},
            )  # fmt: skip
