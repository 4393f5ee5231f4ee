"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from smartkv_ext.eval.items import Document

from .documents import documents_with_questions
from .gsm8k import gsm8k
from .longbench import longbench
from .options import TaskOptions
from .recall import recall
from .ruler import ruler
from .text import text

Task = Callable[[TaskOptions], Iterator[Document]]

TASKS: dict[str, Task] = {
    "text": text,
    "recall": recall,
    "documents": documents_with_questions,
    "ruler": ruler,
    "longbench": longbench,
    "gsm8k": gsm8k,
}


def get_documents(names: Sequence[str], options: TaskOptions) -> Iterator[Document]:
    """Documents of all named tasks. Raises ValueError for an unknown name, before anything is read."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {name!r}")
    for name in names:
        yield from TASKS[name](options)
