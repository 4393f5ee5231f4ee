"""Needles in a haystack, eight tasks, and variable tracking in the same noise."""

from __future__ import annotations

import random
import re
import string
import uuid
from functools import lru_cache
from itertools import pairwise
from typing import Any

from smartkv_ext.eval.items import Document
from smartkv_ext.eval.tasks.options import TaskOptions, read_text

from .frame import Frame, Sample, shuffled, templates, words

DEPTHS = tuple(round(i * 100 / 39) for i in range(40))  # percent, 0 to 100


class Niah:
    """One task: what its needles look like and what they are hidden in."""

    def __init__(self, options: TaskOptions, length: int, name: str) -> None:
        self.frame = Frame(options, "niah", length)
        self.name, self.task = name, templates(options)["tasks"][name]
        self.needle: str = templates(options)["needle"]
        self.noise: str = templates(options)["noise"]

    def documents(self) -> list[Document]:
        """At the largest haystack that fits."""
        kind = self.task["type_haystack"]
        step = 500 if kind == "essay" else 5 if self.frame.is_short else 25
        if kind == "essay" and self.frame.is_short:
            step = 100  # upstream's 500 words would leave a quarter of 2,048 tokens empty
        return self.frame.documents(self.name, self.make, step)

    def make(self, units: int, rng: random.Random) -> Sample:
        """A sample whose haystack has ``units`` words, lines or distractors."""
        task, seed = self.task, self.frame.options.seed
        num_keys = max(task["num_needle_k"], task["num_needle_q"])
        keys = [self._value(task["type_needle_k"], rng) for _ in range(num_keys)]
        values = [[self._value(task["type_needle_v"], rng) for _ in range(task["num_needle_v"])] for _ in keys]
        needles = [self._needle(k, v) for k, each in zip(keys, values, strict=True) for v in each]
        context = self._hide(shuffled(needles, seed), units, rng, set(keys))
        asked = rng.sample(range(num_keys), task["num_needle_q"])
        names = [keys[i] for i in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        answers = tuple(v for i in asked for v in values[i])
        template, prefix, kind = self.frame.spec["template"], self.frame.spec["answer_prefix"], task["type_needle_v"]
        if len(answers) == 1:
            template, prefix, kind = singular(template), singular(prefix), kind.removesuffix("s")
        fields = {"type_needle_v": kind, "query": query}
        text, question = self.frame.split(template, context=context, **fields)
        return Sample(text, question, prefix.format(**fields), answers)

    def _needle(self, key: str, value: str) -> str:
        return self.needle.format(type_needle_v=self.task["type_needle_v"], key=key, value=value)

    def _value(self, kind: str, rng: random.Random) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        adjectives, nouns = word_lists(self.frame.options)
        return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"

    def _hide(self, needles: list[str], units: int, rng: random.Random, keys: set[str]) -> str:
        kind = self.task["type_haystack"]
        if kind == "essay":
            return hide_in_essay(needles, essay(self.frame.options, units), rng)
        lines = [self.noise] * units if kind == "noise" else [self._distractor(keys, rng) for _ in range(units)]
        for place in sorted(rng.sample(range(len(lines)), len(needles)), reverse=True):
            lines.insert(place, needles.pop())
        return "\n".join(lines)

    def _distractor(self, keys: set[str], rng: random.Random) -> str:
        while True:  # upstream lets a distractor have the true key
            key = self._value(self.task["type_needle_k"], rng)
            if key not in keys:
                return self._needle(key, self._value(self.task["type_needle_v"], rng))


def singular(template: str) -> str:
    """ "Some special magic numbers are" -> "A special magic number is". Applied to the task's template only: upstream
    would turn a system prompt's "You are" into "You is" as well."""
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")


@lru_cache(maxsize=4)
def word_lists(options: TaskOptions) -> tuple[list[str], list[str]]:
    """Adjectives and nouns of the needles' keys."""
    return words(options, "adjective"), words(options, "noun")


@lru_cache(maxsize=4)
def _essay_words(options: TaskOptions) -> list[str]:
    folder = options.file("haystack")
    sources = sorted(folder.glob("*.jsonl")) + sorted(folder.glob("*.txt"))
    if not sources:
        raise ValueError(f"haystack folder {str(folder)!r} must hold .txt or .jsonl files")
    return " ".join(read_text(str(path)) for path in sources).split()


def essay(options: TaskOptions, count: int) -> str:
    """The first ``count`` words of the haystack, from its beginning again where it ends."""
    found = _essay_words(options)
    return " ".join((found * (count // len(found) + 1))[:count])


def hide_in_essay(needles: list[str], text: str, rng: random.Random) -> str:
    """Between sentences, at distinct depths. Sentences end where . ! or ? is followed by space and a capital."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", text.strip())
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    places = [int(len(sentences) * depth / 100) for depth in depths]
    parts: list[str] = []
    for begin, end, needle in zip([0, *places], places, needles, strict=False):
        parts += [*sentences[begin:end], needle]
    return " ".join([*parts, *sentences[places[-1] :]])


class VariableTracking:
    """A chain of assignments in noise, after a solved example."""

    def __init__(self, options: TaskOptions, length: int) -> None:
        self.frame = Frame(options, "variable_tracking", length)
        self.task: dict[str, Any] = templates(options)["tasks"]["vt"]
        self.noise: str = templates(options)["noise"]

    def documents(self) -> list[Document]:
        """At the most noise that fits."""
        return self.frame.documents("vt", self.make, 5 if self.frame.is_short else 10)

    def make(self, units: int, rng: random.Random) -> Sample:
        """``units`` lines of noise."""
        example = self._part(self._example_lines(), rng, letters=3, value="12345")
        shot = example.context + example.question + example.answer_prefix + " ".join(example.answers) + "\n"
        main = self._part(units, rng, letters=5, value=str(rng.randrange(10000, 99999)))
        return Sample(shot + main.context, main.question, main.answer_prefix, main.answers)

    def _part(self, units: int, rng: random.Random, letters: int, value: str) -> Sample:
        count = self.task["num_hops"] + 1
        names: list[str] = []
        while len(names) < count:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
        lines = [self.noise] * units
        for i, place in enumerate(sorted(rng.sample(range(len(lines)), len(chain)))):
            lines.insert(place + i, chain[i])
        fields = {"query": value, "num_v": str(count)}
        context = "\n".join(lines).replace(". \n", ".\n")
        text, question = self.frame.split(self.frame.spec["template"], context=context, **fields)
        return Sample(text, question, self.frame.spec["answer_prefix"].format(**fields), tuple(names))

    def _example_lines(self) -> int:
        """As many lines of noise, in fives, as keep the example within 500 tokens."""
        line = len(self.frame.options.tokenizer(self.noise, add_special_tokens=False).input_ids)
        return max((500 - 200) // (5 * line) * 5, 5)
