"""Planted facts: a grid of depths and lengths.

A document carries one sentence with a random number at each depth, each about another city. The numbers are asked for
one at a time after the document has been compressed once, so the compressor cannot know which will be asked; the
other sentences are distractors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from smartkv_ext.eval.items import Document, Question

from .options import TaskOptions

DEPTHS = (5, 18, 31, 44, 56, 69, 82, 95)  # percent
CITIES = (
    "Lisbon", "Nairobi", "Oslo", "Quito", "Tallinn", "Hanoi", "Denver", "Cairo", "Lima", "Zagreb", "Osaka", "Perth",
    "Dublin", "Havana", "Riga", "Manila", "Bogota", "Seville", "Accra", "Tunis", "Boston", "Krakow", "Delhi", "Kyoto",
)  # fmt: skip
INTRO = "Read the following text and remember the magic numbers in it.\n\n"


def recall(options: TaskOptions) -> Iterator[Document]:
    """``samples`` documents of each length, from one text (the first); sample i begins i / samples into it."""
    name, text = next(options.sources())
    for length in options.lengths:
        for sample in range(options.samples):
            rng = random.Random(f"{options.seed}/{length}/{sample}")
            cities = rng.sample(CITIES, len(DEPTHS))
            numbers = [str(rng.randrange(1000, 10000)) for _ in DEPTHS]
            needles = [f"The special magic number for {c} is {n}." for c, n in zip(cities, numbers, strict=True)]
            haystack = text[len(text) * sample // max(options.samples, 1) :]
            facts = {"length": length}
            yield Document(
                task="recall", name=f"{name}/{length}/{sample}", facts=facts,
                context=INTRO + plant(options.tokenizer, haystack, needles, length) + "\n\n",
                questions=tuple(map(_question, cities, numbers, DEPTHS)),
            )  # fmt: skip


def _question(city: str, number: str, depth: int) -> Question:
    return Question(
        name=city, text=f"What is the special magic number for {city} mentioned in the text?", answers=(f" {number}",),
        metric="forced", answer_prefix=f"The special magic number for {city} is", facts={"depth": depth},
    )  # fmt: skip


def plant(tokenizer: Any, text: str, needles: list[str], length: int) -> str:
    """About ``length`` tokens of sentences, with a needle at each of DEPTHS."""
    room = length - sum(len(tokenizer(needle).input_ids) for needle in needles)
    ids = tokenizer(text[: 12 * length], add_special_tokens=False).input_ids[: max(room, 0)]
    sentences = tokenizer.decode(ids).replace("\n", " ").split(". ")
    if room < 1 or len(ids) < room or len(sentences) < len(needles):
        raise ValueError(f"a document of {length} tokens with {len(needles)} facts needs more text than there is")
    for needle, depth in reversed(list(zip(needles, DEPTHS, strict=True))):
        sentences.insert(len(sentences) * depth // 100, needle.removesuffix("."))
    return ". ".join(sentences)
