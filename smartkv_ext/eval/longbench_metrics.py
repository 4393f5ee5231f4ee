"""LongBench's official metrics, and GSM8K's. Scores in [0, 1]."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any


def _lcs_words(reference: list[str], prediction: list[str]) -> set[str]:
    """The set of words on one longest common subsequence. Ties: step back in the reference only if strictly better.

    Upstream recurses and gives 0 where that is too deep; here it is a loop.
    """
    n = len(prediction)
    table = [[0] * (n + 1) for _ in range(len(reference) + 1)]
    for i, a in enumerate(reference, 1):
        for j, b in enumerate(prediction, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    found = set()
    i, j = len(reference), n
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            found.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_l_pair(prediction: str, reference: str) -> float:
    """F of PyPI ``rouge``'s summary-level rouge-l: sentences end at full stops, words count once, no stemming."""
    ours, theirs = (
        [" ".join(s.split()).split(" ") for s in text.split(".") if len(s) > 0] for text in (prediction, reference)
    )
    ours, theirs = ([s for s in sentences if s != [""]] for sentences in (ours, theirs))
    if not ours or not theirs:
        return 0.0
    union = {w for reference_words in theirs for words in ours for w in _lcs_words(reference_words, words)}
    recall = len(union) / len({w for s in theirs for w in s})
    precision = len(union) / len({w for s in ours for w in s})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """Best over the answers."""
    return max(rouge_l_pair(prediction, answer) for answer in answers)


def classification(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """Best over the answers of 1 / (class names in the prediction), names within the right one not counted."""

    def one(gold: str) -> float:
        matches = [c for c in facts["classes"] if c in prediction and not (c in gold and c != gold)]
        return 1 / len(matches) if gold in matches else 0.0

    return max(map(one, answers))


def _share(prediction: str, gold: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """Share of the numbers in the prediction that name the right paragraph."""
    return max(_share(prediction, re.findall(r"Paragraph (\d+)", answer)[0]) for answer in answers)


def count(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """Share of the numbers in the prediction that are right."""
    return max(_share(prediction, str(answer)) for answer in answers)


def code_sim(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """fuzzywuzzy's ratio of the first line that is neither a comment nor a code fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return max(_fuzz_ratio(line, answer) for answer in answers)


def _fuzz_ratio(a: str, b: str) -> float:
    if not a or not b:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, a, b).ratio()) / 100


def final_number(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """The number after "####" (GSM8K's official extraction); without that mark the last number, a deviation."""
    marked = re.search(r"#### (-?[0-9.,]+)", prediction)
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", prediction)
    said = marked[1] if marked else numbers[-1] if numbers else ""
    return float(said.replace(",", "").rstrip(".") in answers)
