"""Counting: common words (cwe) and frequent coded words (fwe)."""

from __future__ import annotations

import random
import string
from functools import lru_cache
from typing import Any

from smartkv_ext.eval.items import Document
from smartkv_ext.eval.tasks.options import TaskOptions

from .frame import Frame, Sample, shuffled, templates, words

ZETA_2 = 1.6449340668482264  # Riemann's zeta(2)


class CommonWords:
    """Ten words that come more often than the others, in a numbered list, after a solved example."""

    def __init__(self, options: TaskOptions, length: int) -> None:
        self.frame = Frame(options, "common_words_extraction", length)
        self.task: dict[str, Any] = templates(options)["tasks"]["cwe"]
        self.common: int = 6 if self.frame.is_short else self.task["freq_cw"]
        self.rare: int = 1 if self.frame.is_short else self.task["freq_ucw"]
        self.vocabulary = cwe_vocabulary(options)

    def documents(self) -> list[Document]:
        """At the longest list that fits and that the vocabulary allows."""
        return self.frame.documents("cwe", self.make, 10, most=len(self.vocabulary))

    def make(self, units: int, rng: random.Random) -> Sample:
        """``units`` different words, at least eleven."""
        size, common, rare = (20, 3, 1) if self.frame.is_short else (40, 10, 3)
        example, example_answers = self._list(size, common, rare, rng)
        context, answers = self._list(max(units, self.task["num_cw"] + 1), self.common, self.rare, rng)
        template, prefix = self.frame.spec["template"], self.frame.spec["answer_prefix"]
        solved = " ".join(f"{i}. {word}" for i, word in enumerate(example_answers, 1))
        shot = template.format(context=example) + prefix + " " + solved + "\n"
        text, question = self.frame.split(template, context=context)
        return Sample(shot + text, question, prefix, tuple(answers))

    def _list(self, size: int, common: int, rare: int, rng: random.Random) -> tuple[str, list[str]]:
        chosen = rng.sample(self.vocabulary, min(size, len(self.vocabulary)))
        often, others = chosen[: self.task["num_cw"]], chosen[self.task["num_cw"] :]
        entries = shuffled(often * common + others * rare, self.frame.options.seed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1)), often


@lru_cache(maxsize=4)
def cwe_vocabulary(options: TaskOptions) -> list[str]:
    """Nouns, adjectives and verbs in a fixed random order."""
    return shuffled(words(options, "noun", "adjective", "verb"), options.seed)


class FrequentWords:
    """Coded words with Zipf frequencies; the most frequent one is noise, the next three are asked for."""

    def __init__(self, options: TaskOptions, length: int) -> None:
        self.frame = Frame(options, "freq_words_extraction", length)
        self.letters = templates(options)["tasks"]["fwe"]["coded_wordlen"]
        self.budget = length - int(self.frame.spec["tokens_to_generate"])

    def documents(self) -> list[Document]:
        """With as many words as fit."""
        return self.frame.documents("fwe", self.make, max(self.budget // 32, 1))

    def make(self, units: int, rng: random.Random) -> Sample:
        """About ``units`` words: rank k comes int(units / (k^2 zeta(2))) times."""
        size = max(self.budget // 50, 5)
        coded = {"".join(rng.choices(string.ascii_lowercase, k=self.letters)) for _ in range(size)}
        ranks = shuffled(sorted(coded), self.frame.options.seed)
        ranks[0] = "..."
        entries = [w for k, w in enumerate(ranks, 1) for _ in range(int(units / (k**2 * ZETA_2)))]
        context = " ".join(shuffled(entries, self.frame.options.seed))
        text, question = self.frame.split(self.frame.spec["template"], context=context)
        return Sample(text, question, self.frame.spec["answer_prefix"], tuple(ranks[1:4]))
