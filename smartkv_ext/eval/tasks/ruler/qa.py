"""Questions about one of many documents: SQuAD (qa_1) and HotpotQA (qa_2)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache

from smartkv_ext.eval.items import Document
from smartkv_ext.eval.tasks.options import TaskOptions

from .frame import Frame, Sample, shuffled, templates


@dataclass(frozen=True)
class Entry:
    """A question, its answers, the documents that it needs, and others of the same article."""

    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    more: tuple[str, ...] = ()


@lru_cache(maxsize=4)
def squad(options: TaskOptions) -> tuple[list[Entry], list[str]]:
    """Answerable questions in file order, and all paragraphs."""
    path = options.file("qa/squad_dev_v2_half.json", "squad.json", "dev-v2.0.json")
    entries, pool = [], set()
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        paragraphs = [p["context"] for p in article["paragraphs"]]
        pool |= set(paragraphs)
        for paragraph in article["paragraphs"]:
            own = paragraph["context"]
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible"):
                    answers = tuple(answer["text"] for answer in qa["answers"])
                    more = tuple(p for p in paragraphs if p != own)
                    entries.append(Entry(qa["question"], answers, (own,), more))
    return entries, sorted(pool)


@lru_cache(maxsize=4)
def hotpotqa(options: TaskOptions) -> tuple[list[Entry], list[str]]:
    """Questions with their own ten paragraphs, and all paragraphs."""
    path = options.file("qa/hotpotqa_train100.json", "hotpotqa.json", "hotpot_dev_distractor_v1.json")
    entries, pool = [], set()
    for row in json.loads(path.read_text(encoding="utf-8")):
        documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"])
        pool |= set(documents)
        entries.append(Entry(row["question"], (row["answer"],), documents))
    return entries, sorted(pool)


class QuestionAnswering:
    """Sample i asks question i among as many documents as fit."""

    def __init__(self, options: TaskOptions, length: int, name: str) -> None:
        self.frame, self.name = Frame(options, "qa", length), name
        self.entries, self.pool = (squad if name == "qa_1" else hotpotqa)(options)
        self.document: str = templates(options)["document"]

    def documents(self) -> list[Document]:
        """Each question has its own size: the documents that it needs are never left out."""
        out: list[Document] = []
        for index, entry in enumerate(self.entries):
            if len(out) == self.frame.options.samples:
                break

            def make(units: int, rng: random.Random, entry: Entry = entry) -> Sample:
                return self._make(entry, units, rng)

            try:
                units = self.frame.largest(make, 1, most=len(self.pool))
            except ValueError:  # the documents that this question needs are too long
                continue
            out.append(self.frame.document(self.name, index, make, units, 1))
        if not out:
            raise ValueError(f"RULER's {self.name} does not fit into {self.frame.length} tokens")
        return out

    def _make(self, entry: Entry, units: int, rng: random.Random) -> Sample:
        count = max(units - len(entry.gold), 0)
        chosen = rng.sample(entry.more, min(count, len(entry.more)))
        known = set(entry.gold) | set(entry.more)
        others = [document for document in self.pool if document not in known]
        chosen += rng.sample(others, min(count - len(chosen), len(others)))
        documents = shuffled([*entry.gold, *chosen], self.frame.options.seed)
        context = "\n\n".join(self.document.format(i=i, document=text) for i, text in enumerate(documents, 1))
        text, question = self.frame.split(self.frame.spec["template"], context=context, query=entry.question)
        return Sample(text, question, self.frame.spec["answer_prefix"], entry.answers)
