"""What is asked: a document that is compressed, and what is wanted from it afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Question:
    """A question about a document, and how its answer is scored.

    ``metric`` names a function of ``metrics.METRICS``, or is "forced": the answer is fed, and the score is 1 if greedy
    decoding would have begun with it, token by token. That costs one forward and gives the answer's likelihood too.
    """

    name: str
    text: str
    answers: tuple[str, ...]
    metric: str = "string_match_all"
    answer_prefix: str = ""  # begins the answer in the model's place
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()  # decoding ends where one of these appears
    first_line: bool = False  # score the first line that is not empty
    facts: dict[str, Any] = field(default_factory=dict)  # for the tables: depth, classes, ...


@dataclass(frozen=True)
class Document:
    """A text with questions; or token ids with the tokens that truly follow them.

    ``context`` is what every question's prompt begins with: templates may put words before and after the document.
    """

    task: str
    name: str  # unique within a task and its settings
    context: str = ""
    questions: tuple[Question, ...] = ()
    chat: bool = True  # wrap into the tokenizer's chat template, if it has one
    ids: torch.Tensor | None = None  # (1, n) int64 instead of a context
    continuation: torch.Tensor | None = None  # (1, m) int64
    facts: dict[str, Any] = field(default_factory=dict)
