"""A document and a question as token ids, split so that the document can be prefilled before the question is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from smartkv_ext.eval.prompt import Prompt, split_prompt

from .errors import UsageError


def read_document(name: str) -> str:
    """Text of a file, or of stdin for "-"."""
    if name == "-":
        text = sys.stdin.read()
    else:
        path = Path(name)
        if not path.exists():
            raise UsageError(f"document {name!r} does not exist")
        if not path.is_file():
            raise UsageError(f"document {name!r} is not a file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"document {name!r} is not UTF-8 text (byte {error.start} is not)") from None
        except OSError as error:
            raise UsageError(f"document {name!r} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UsageError("the document is empty" + (" (nothing came from stdin)" if name == "-" else f": {name!r}"))
    return text


def build_prompt(tokenizer: Any, document: str, question: str) -> Prompt:
    """One user turn "document, question" in the tokenizer's chat template, or plain text where it has none."""
    document, question = document.strip(), question.strip()
    if not question:
        raise UsageError("the question is empty")
    if not getattr(tokenizer, "chat_template", None):
        question = f"Question: {question}\nAnswer:"
    try:
        return split_prompt(tokenizer, f"{document}\n\n", question)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_length(prompt: Prompt, max_new_tokens: int, context: int | None) -> None:
    """Raise if the conversation cannot fit into the model's context: compression does not extend it."""
    total = prompt.num_tokens + max_new_tokens
    if context is not None and total > context:
        raise UsageError(
            f"the document is too long for the model's context of {context:,} tokens: {prompt.document.shape[1]:,} "
            f"of the document, {prompt.question.shape[1]:,} of the question and up to {max_new_tokens:,} of the answer "
            f"are {total:,}"
        )
