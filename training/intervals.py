"""How sure is a median AUC over heads? Documents, or pieces of text, are drawn anew from those that it was measured on.

Tokens of one document are alike, so a bootstrap draws whole documents (a cluster bootstrap).
"""

from __future__ import annotations

from typing import Any

import numpy

DRAWS = 1000
COVERED = 95  # percent of the draws


def ordered_pairs(labels: Any, scores: Any, groups: Any, count: int) -> tuple[Any, Any, Any]:
    """Of one head: wins (count, count), positives and negatives (count,).

    wins[g, h] counts pairs of a positive of group g and a negative of h whose scores are in the right order, ties half.
    labels (n,) bool, scores (n,), groups (n,) numbers below ``count``.
    """
    order = numpy.argsort(scores, kind="stable")
    labels, scores, member = labels[order], scores[order], numpy.eye(count)[groups[order]]
    below = numpy.vstack([numpy.zeros((1, count)), numpy.cumsum(member * ~labels[:, None], 0)])
    low, high = (numpy.searchsorted(scores, scores[labels], side) for side in ("left", "right"))
    wins = member[labels].T @ ((below[low] + below[high]) / 2)
    return wins, member[labels].sum(0), below[-1]


def median_auc_interval(labels: Any, scores: Any, groups: Any) -> tuple[float, float] | None:
    """The middle COVERED % of the medians of DRAWS draws; None for a single group.

    labels (heads, n) bool, scores (heads, n), groups (n,) integers. A head counts in the draws that have both labels.
    """
    names, index = numpy.unique(groups, return_inverse=True)
    count = len(names)
    if count < 2 or not len(labels):
        return None
    weights = numpy.random.default_rng(0).multinomial(count, numpy.full(count, 1 / count), DRAWS).astype(float)
    aucs = []
    for y, s in zip(labels, scores, strict=True):
        wins, positives, negatives = ordered_pairs(y, s, index, count)
        pairs = (weights @ positives) * (weights @ negatives)
        right = ((weights @ wins) * weights).sum(1)
        aucs.append(numpy.divide(right, pairs, out=numpy.full(DRAWS, numpy.nan), where=pairs > 0))
    medians = numpy.nanmedian(aucs, 0)
    edge = (100 - COVERED) / 2
    low, high = numpy.nanpercentile(medians, (edge, 100 - edge))
    return float(low), float(high)


def halves(groups: Any) -> Any:
    """(n,) 0 or 1 for each of groups (n,): two halves of about as many tokens that share no group."""
    names, index, sizes = numpy.unique(groups, return_inverse=True, return_counts=True)
    side, filled = numpy.zeros(len(names), dtype=int), [0, 0]
    for i in numpy.argsort(-sizes, kind="stable"):
        side[i] = int(filled[1] < filled[0])
        filled[side[i]] += sizes[i]
    return side[index]
