"""The thirteen tasks by name."""

from __future__ import annotations

from collections.abc import Iterator

from smartkv_ext.eval.items import Document
from smartkv_ext.eval.tasks.options import TaskOptions

from .aggregation import CommonWords, FrequentWords
from .niah import Niah, VariableTracking
from .qa import QuestionAnswering

_NIAH = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery",
)  # fmt: skip
RULER_TASKS = (*_NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")


def generate(name: str, options: TaskOptions, length: int) -> list[Document]:
    """Documents of one task at one length. Raises ValueError for an unknown name."""
    if name in _NIAH:
        return Niah(options, length, name).documents()
    if name == "vt":
        return VariableTracking(options, length).documents()
    if name == "cwe":
        return CommonWords(options, length).documents()
    if name == "fwe":
        return FrequentWords(options, length).documents()
    if name in ("qa_1", "qa_2"):
        return QuestionAnswering(options, length, name).documents()
    raise ValueError(f"RULER task must be one of {', '.join(RULER_TASKS)}; got {name!r}")


def ruler(options: TaskOptions) -> Iterator[Document]:
    """All tasks, or those named in ``options.subtasks``, at every length."""
    for length in options.lengths:
        for name in options.subtasks or RULER_TASKS:
            yield from generate(name, options, length)
