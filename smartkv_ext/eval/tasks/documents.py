"""Documents with questions whose answers people have checked."""

from __future__ import annotations

import json
from collections.abc import Iterator

from smartkv_ext.eval.items import Document, Question

from .options import TaskOptions

INTRO = "Read the following text and answer the question about it in a few words.\n\n"


def documents_with_questions(options: TaskOptions) -> Iterator[Document]:
    """The documents of demos/facts.jsonl, cut to each length; questions whose evidence was cut off are left out.

    A line has file (relative to the folder), question, answer and evidence (a passage, words as in the file).
    """
    listing = options.file("demos/facts.jsonl", "facts.jsonl")
    root = options.data
    assert root is not None, "the listing was found in it"
    by_file: dict[str, list[dict[str, str]]] = {}
    for line in listing.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        by_file.setdefault(entry["file"], []).append(entry)
    for name, entries in by_file.items():
        whole = (root / name).read_text(encoding="utf-8")
        for length in options.lengths:
            ids = options.tokenizer(whole, add_special_tokens=False).input_ids[:length]
            text = options.tokenizer.decode(ids)
            plain = " ".join(text.split())
            questions = tuple(_question(e) for e in entries if " ".join(e["evidence"].split()) in plain)
            if questions:
                yield Document(
                    task="documents", name=f"{name}/{length}", context=f"{INTRO}{text}\n\n", questions=questions,
                    facts={"length": length},
                )  # fmt: skip


def _question(entry: dict[str, str]) -> Question:
    return Question(
        name=entry["id"], text=f"Question: {entry['question']}", answers=(entry["answer"],), metric="contains_words",
        max_new_tokens=32, stop=("\n",),
    )  # fmt: skip
