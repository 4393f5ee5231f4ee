"""Golden values of LongBench's official metrics."""

import pytest

from smartkv_ext.eval.metrics import METRICS

GOLDEN = [
    ("qa_f1", "The Bob Dylan, of course!", "Bob Dylan", 0.666667),
    ("qa_f1", "no", "No, it is not necessary.", 0.333333),
    ("qa_f1", "a the an", "the", 0),
    ("qa_f1", "5 percent points", "5 percent points.", 1),
    ("qa_f1", "well-known", "well known", 0),
    ("rouge_l", "the cat sat on the mat", "the cat lay on the mat", 0.799999995),
    ("rouge_l", "a b c d. e f g", "a c d e. g f", 0.769230764),
    ("rouge_l", "The tax was cut. The tax was cut again.", "The tax was cut twice.", 0.799999995),
    ("rouge_l", "", "abc", 0),
    ("rouge_l", "...", "abc", 0),
    ("rouge_l", "x y", "a b", 0),
    ("retrieval", "Paragraph 19 or 3", "Paragraph 3", 0.5),
    ("retrieval", "none", "Paragraph 3", 0),
    ("count", "46 of 50", "46", 0.5),
    ("code_sim", "return y", "return x", 0.88),
    ("code_sim", "if e.text == language:", "            if e.text == language:", 0.79),
    ("code_sim", "\n# a comment\nreturn x", "return x", 1),
    ("code_sim", "# only a comment", "return x", 0),
    ("final_number", "so 5 + 4 = 9.\n#### 1,009", "1009", 1),
    ("final_number", "it is 12 apples, 7 pears.", "7", 1),
    ("final_number", "nothing", "7", 0),
]


@pytest.mark.parametrize("name, prediction, answer, expected", GOLDEN)
def test_golden(name, prediction, answer, expected):
    assert METRICS[name](prediction, [answer], {}) == pytest.approx(expected, abs=1e-6)


def test_classification():
    classes = {"classes": ["Individual", "City", "Other location", "location"]}
    assert METRICS["classification"]("It is an Individual or City", ["City"], classes) == 0.5
    assert METRICS["classification"]("Other location", ["Other location"], classes) == 1
    assert METRICS["classification"]("city", ["City"], classes) == 0


def test_the_best_answer_counts():
    assert METRICS["qa_f1"]("Paris", ["London", "Paris"], {}) == 1


def test_long_sentences_do_not_recurse():
    words = " ".join(str(i) for i in range(1200))
    assert METRICS["rouge_l"](words, [words], {}) == pytest.approx(1, abs=1e-6)
