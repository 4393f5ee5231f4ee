"""A document and a question as token ids, split so that the document can be prefilled before the question is known."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError

_SPLIT = "<<smartkv:question>>"  # stands where the question begins while the chat template is rendered


@dataclass(frozen=True)
class Prompt:
    """Token ids (1, n) int64: ``document`` does not depend on the question."""

    document: torch.Tensor
    question: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of both parts."""
        return self.document.shape[1] + self.question.shape[1]


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
    """One user turn "document, question" in the tokenizer's chat template, or plain text where it has none.

    Both parts are tokenised on their own: the tokens of the document must be the same whatever is asked.
    """
    document, question = document.strip(), question.strip()
    if not question:
        raise UsageError("the question is empty")
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": f"{document}\n\n{_SPLIT}{question}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(_SPLIT)
        if not found:
            raise UsageError(
                "the model's chat template changes the user's text, so that the document cannot be split off"
            )
        # The template has written the special tokens itself.
        parts = [tokenizer(x, add_special_tokens=False).input_ids for x in (before, after)]
    else:
        parts = [
            tokenizer(f"{document}\n\n").input_ids,
            tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False).input_ids,
        ]
    first, second = (torch.tensor([ids], dtype=torch.int64) for ids in parts)
    return Prompt(first, second)


def check_length(prompt: Prompt, max_new_tokens: int, context: int | None) -> None:
    """Raise if the conversation cannot fit into the model's context: compression does not extend it."""
    total = prompt.num_tokens + max_new_tokens
    if context is not None and total > context:
        raise UsageError(
            f"the document is too long for the model's context of {context:,} tokens: {prompt.document.shape[1]:,} "
            f"of the document, {prompt.question.shape[1]:,} of the question and up to {max_new_tokens:,} of the answer "
            f"are {total:,}"
        )
