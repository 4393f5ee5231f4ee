"""LongBench v1 (Bai et al. 2024), English and code: rows from a local folder, prompts from prompts_en.json there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smartkv_ext.eval.items import Document, Question

from .options import TaskOptions

STOP = {"samsum": ("\n",)}


def longbench(options: TaskOptions) -> Iterator[Document]:
    """Every <task>.jsonl of the folder, or those in ``options.subtasks``; ``samples`` rows of each.

    ``lengths`` are the tokens that prompts are cut to, in the middle. Raises ValueError for a task without a prompt or
    a row without the fields input, context and answers.
    """
    prompts_file = options.file("longbench/prompts_en.json", "prompts_en.json")
    prompts = json.loads(prompts_file.read_text(encoding="utf-8"))
    names = options.subtasks or tuple(sorted(path.stem for path in prompts_file.parent.glob("*.jsonl")))
    for name in names:
        path = prompts_file.with_name(f"{name}.jsonl")
        if name not in prompts or not path.is_file():
            raise ValueError(f"LongBench task {name!r} needs {path.name} and a prompt in {prompts_file.name}")
        for length in options.lengths:
            yield from _documents(options, path, prompts[name], length)


def _documents(options: TaskOptions, path: Path, prompt: dict[str, Any], length: int) -> Iterator[Document]:
    lines = path.read_text(encoding="utf-8").splitlines()[: options.samples]
    for number, line in enumerate(lines):
        row = json.loads(line)
        missing = [field for field in ("input", "context", "answers") if field not in row]
        if missing:
            raise ValueError(f"{path.name}, line {number + 1}, has no {', '.join(missing)}")
        before, after = prompt["prompt"].split("{context}")
        context = before.replace("{input}", row["input"]) + row["context"]
        ask = after.replace("{input}", row["input"])
        question = Question(
            name=path.stem, text=ask, answers=tuple(row["answers"]), metric=prompt["metric"],
            max_new_tokens=prompt["max_new_tokens"], stop=STOP.get(path.stem, ()),
            first_line=prompt["first_line_only"], facts={"classes": row.get("all_classes") or []},
        )  # fmt: skip
        yield Document(
            task="longbench", name=f"{path.stem}/{length}/{row.get('_id', number)}",
            context=cut_middle(options.tokenizer, context, ask, length), questions=(question,),
            chat=prompt["chat_template"], facts={"subtask": path.stem, "length": length},
        )  # fmt: skip


def cut_middle(tokenizer: Any, context: str, question: str, length: int) -> str:
    """The context without its middle, so that first and last length // 2 tokens of context and question remain."""
    ids = tokenizer(context, add_special_tokens=False).input_ids
    asked = len(tokenizer(question, add_special_tokens=False).input_ids)
    if len(ids) + asked <= length:
        return context
    tail = max(length // 2 - asked, 0)
    head: str = tokenizer.decode(ids[: length // 2])
    end: str = tokenizer.decode(ids[len(ids) - tail :])
    return head + end
