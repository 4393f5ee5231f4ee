"""What the families share: templates, samples, and the search for the size that fills the length."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smartkv_ext.eval.items import Document, Question
from smartkv_ext.eval.tasks.options import TaskOptions

SHORT = 4096  # below, upstream takes smaller steps and fewer repetitions


@dataclass(frozen=True)
class Sample:
    """One prompt: ``context`` is compressed, ``question`` follows. Joined they are the task's template."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]


Make = Callable[[int, random.Random], Sample]  # a sample of so many units


@dataclass(frozen=True)
class Frame:
    """Templates and the tokens that a sample may take."""

    options: TaskOptions
    family: str
    length: int  # tokens of prompt and answer

    @property
    def spec(self) -> dict[str, Any]:
        """template, answer_prefix, tokens_to_generate and metric of the family."""
        found: dict[str, Any] = templates(self.options)["families"][self.family]
        return found

    @property
    def is_short(self) -> bool:
        """Shorter than RULER's shortest published length."""
        return self.length < SHORT

    def split(self, template: str, **fields: str) -> tuple[str, str]:
        """(context, question) of a template: cut after the haystack, whose field is "context" or "documents"."""
        before, after = template.split("{context}")
        return before.format(**fields) + fields["context"], after.format(**fields)

    def tokens(self, sample: Sample) -> int:
        """Tokens of the whole prompt, chat template included, and of the answer."""
        tokenizer = self.options.tokenizer
        text = sample.context + sample.question
        if getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + sample.answer_prefix, add_special_tokens=False).input_ids
        return len(ids) + int(self.spec["tokens_to_generate"])

    def largest(self, make: Make, step: int, most: int | None = None) -> int:
        """The largest multiple of ``step`` units whose sample fits, by bisection. Raises ValueError if none does."""

        def fits(count: int) -> bool:
            return self.tokens(make(count * step, random.Random(self.options.seed))) <= self.length

        if not fits(1):
            raise ValueError(f"RULER's {self.family} does not fit into {self.length} tokens")
        low, high = 1, 2
        limit = None if most is None else max(most // step, 1)
        while fits(high) and (limit is None or high < limit):
            low, high = high, 2 * high
        if limit is not None:
            high = min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * step

    def documents(self, name: str, make: Make, step: int, most: int | None = None) -> list[Document]:
        """``options.samples`` documents at the largest size; a sample that overflows shrinks step by step."""
        units = self.largest(make, step, most)
        return [self.document(name, index, make, units, step) for index in range(self.options.samples)]

    def document(self, name: str, index: int, make: Make, units: int, step: int) -> Document:
        """Sample ``index`` with at most ``units``. Raises ValueError if not even one step fits."""
        for count in range(units, 0, -step):
            sample = make(count, random.Random(f"{self.options.seed}/{name}/{index}"))
            if self.tokens(sample) <= self.length:
                break
        else:
            raise ValueError(f"RULER's {name}, sample {index}, does not fit into {self.length} tokens")
        question = Question(
            name=name, text=sample.question, answers=sample.answers, metric=self.spec["metric"],
            answer_prefix=sample.answer_prefix, max_new_tokens=int(self.spec["tokens_to_generate"]),
            facts={"length": self.length},
        )  # fmt: skip
        return Document("ruler", f"{name}/{self.length}/{index}", sample.context, (question,), facts={"subtask": name})


def templates(options: TaskOptions) -> dict[str, Any]:
    """Content of ruler/templates.json."""
    content: dict[str, Any] = json.loads(options.file("ruler/templates.json", "templates.json").read_text())
    return content


def shuffled(items: list[Any], seed: int) -> list[Any]:
    """A copy in an order that depends on the seed and the length alone: the same for every sample, as upstream."""
    copy = list(items)
    random.Random(seed).shuffle(copy)
    return copy


def words(options: TaskOptions, *kinds: str) -> list[str]:
    """Sorted distinct words of the lists "noun", "adjective", "verb"."""
    found: set[str] = set()
    for kind in kinds:
        path = options.file(f"ruler/wordlists/{kind}list.txt", f"wordlists/{kind}list.txt")
        found |= set(path.read_text(encoding="utf-8").split("\n")) - {""}
    return sorted(found)
