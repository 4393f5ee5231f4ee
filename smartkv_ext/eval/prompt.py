"""A context and a question as token ids, split so that the context can be prefilled before the question is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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


def chat_parts(tokenizer: Any, context: str, question: str) -> tuple[str, str] | None:
    """One user turn "context question" in the tokenizer's chat template, cut where the question begins.

    None for a tokenizer without a template. Raises ValueError where the template changes the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": f"{context}{_SPLIT}{question}"}]
    text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(_SPLIT)
    if not found:
        raise ValueError("the model's chat template changes the user's text, so that the document cannot be split off")
    return before, after


def tokenize(tokenizer: Any, text: str, special: bool = False) -> torch.Tensor:
    """(1, n) int64."""
    return torch.tensor([tokenizer(text, add_special_tokens=special).input_ids], dtype=torch.int64)


def split_prompt(tokenizer: Any, context: str, question: str, answer_prefix: str = "", chat: bool = True) -> Prompt:
    """Both parts are tokenised on their own: the tokens of the context must be the same whatever is asked."""
    parts = chat_parts(tokenizer, context, question) if chat else None
    if parts is None:
        return Prompt(tokenize(tokenizer, context, special=True), tokenize(tokenizer, question + answer_prefix))
    before, after = parts  # the template has written the special tokens itself
    return Prompt(tokenize(tokenizer, before), tokenize(tokenizer, after + answer_prefix))
