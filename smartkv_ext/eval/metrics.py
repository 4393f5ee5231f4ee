"""Scores in [0, 1] of a prediction against reference answers, by name, and distances between distributions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .longbench_metrics import classification, code_sim, count, final_number, retrieval, rouge_l

Metric = Callable[[str, Sequence[str], Mapping[str, Any]], float]  # prediction, answers, the question's facts


def printable(prediction: str) -> str:
    """RULER's preprocessing: control characters become newlines, the ends are stripped."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """Share of the answers that occur in the prediction, whatever their case (RULER)."""
    text = printable(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """1 if any of the answers occurs (RULER's qa tasks)."""
    text = printable(prediction).lower()
    return float(any(answer.lower() in text for answer in answers))


def normalize(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD's official evaluation compares them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(prediction: str, answer: str) -> float:
    """Bag-of-words F1."""
    ours, theirs = normalize(prediction), normalize(answer)
    common = sum((Counter(ours) & Counter(theirs)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """Best F1 over the answers."""
    return max(f1(prediction, answer) for answer in answers)


def contains_words(prediction: str, answers: Sequence[str], facts: Mapping[str, Any]) -> float:
    """1 if the normalised words of an answer occur in a row in the prediction."""
    text = f" {' '.join(normalize(prediction))} "
    return float(any(f" {' '.join(normalize(answer))} " in text for answer in answers))


MONOTONE = ("string_match_all", "string_match_part")  # of these a longer prediction never scores less
METRICS: dict[str, Metric] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "qa_f1": qa_f1,
    "contains_words": contains_words,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_sim": code_sim,
    "final_number": final_number,
}


def divergence(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) in nats of log-probabilities (..., vocab) float32 -> (...)."""
    return (full.exp() * (full - other)).sum(-1)


def mean_kl(full: torch.Tensor, other: torch.Tensor, chunk: int = 64) -> float:
    """Mean of ``divergence`` over the rows of (n, vocab), in pieces: a vocabulary is large."""
    parts = [divergence(a, b) for a, b in zip(full.split(chunk), other.split(chunk), strict=True)]
    return torch.cat(parts).mean().item()
