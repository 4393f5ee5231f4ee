"""Intervals of a median AUC: exact in every draw, by document, and two halves that share none."""

import numpy
import pytest
from sklearn.metrics import roc_auc_score

from training.intervals import halves, median_auc_interval, ordered_pairs


@pytest.fixture
def head():
    """Labels, scores with ties, and one of five groups of each of 400 tokens."""
    rng = numpy.random.default_rng(0)
    labels = rng.random(400) < 0.2
    return labels, numpy.round(rng.normal(size=400) + labels, 1), rng.integers(5, size=400)


def test_pairs_give_the_auc_of_any_draw(head):
    labels, scores, groups = head
    wins, positives, negatives = ordered_pairs(labels, scores, groups, 5)
    for drawn in ([1, 1, 1, 1, 1], [2, 0, 1, 0, 2], [0, 5, 0, 0, 0]):
        weight = numpy.array(drawn)
        want = roc_auc_score(labels, scores, sample_weight=weight[groups])
        assert weight @ wins @ weight / ((weight @ positives) * (weight @ negatives)) == pytest.approx(want)


def test_the_interval_is_wide_where_groups_differ():
    rng = numpy.random.default_rng(1)
    labels = rng.random((3, 2000)) < 0.3
    groups = numpy.repeat(numpy.arange(20), 100)
    skill = numpy.where(groups % 2, 3.0, 0.0)  # every other document is predicted well
    scores = rng.normal(size=labels.shape) + labels * skill
    low, high = median_auc_interval(labels, scores, groups)
    auc = numpy.median([roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)])
    assert low < auc < high
    narrow = median_auc_interval(labels, scores, numpy.arange(2000) % 20)
    assert high - low > 2 * (narrow[1] - narrow[0])
    assert median_auc_interval(labels, scores, numpy.zeros(2000)) is None, "one document says nothing"


def test_halves_share_no_document():
    documents = numpy.repeat([7, 3, 9, 1, 5], [500, 200, 190, 100, 10])
    side = halves(documents)
    assert [set(side[documents == d]) for d in (7, 3, 9, 1, 5)] == [{0}, {1}, {1}, {1}, {1}]
    assert abs(int((side == 0).sum()) - 500) <= 20
