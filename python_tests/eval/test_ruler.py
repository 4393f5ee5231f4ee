"""RULER's generators on a small data folder."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from python_tests.eval.tokenizer import WordTokenizer
from smartkv_ext.eval.tasks import TaskOptions
from smartkv_ext.eval.tasks.ruler import RULER_TASKS
from smartkv_ext.eval.tasks.ruler.niah import Niah, hide_in_essay, singular
from smartkv_ext.eval.tasks.ruler.tasks import generate

LENGTH = 700


def niah(haystack, key, value, keys=1, values=1, queries=1):
    return {
        "family": "niah", "type_haystack": haystack, "type_needle_k": key, "type_needle_v": value,
        "num_needle_k": keys, "num_needle_v": values, "num_needle_q": queries,
    }  # fmt: skip


def family(template, prefix, tokens, metric="string_match_all"):
    return {"template": template, "answer_prefix": prefix, "tokens_to_generate": tokens, "metric": metric}


TEMPLATES = {
    "families": {
        "niah": family(
            "Some special magic {type_needle_v} are hidden here.\n{context}\n"
            "What are all the {type_needle_v} for {query}?",
            " The {type_needle_v} for {query} are", 20,
        ),
        "variable_tracking": family(
            "Track.\n\n{context}\nFind all that are {query}.", " Answer: {num_v} are {query}: ", 30
        ),
        "common_words_extraction": family("Listen.\n{context}\nWhich ten?", " Answer:", 40),
        "freq_words_extraction": family("Count. {context}\nWhich three?", " Answer:", 20),
        "qa": family("Read.\n\n{context}\n\nQuestion: {query}", " Answer:", 32, "string_match_part"),
    },
    "needle": "One of the special magic {type_needle_v} for {key} is: {value}.",
    "noise": "The grass is green. Here we go.",
    "document": "Document {i}:\n{document}",
    "tasks": {
        "niah_single_1": niah("noise", "words", "numbers"),
        "niah_single_2": niah("essay", "words", "numbers"),
        "niah_single_3": niah("essay", "words", "uuids"),
        "niah_multikey_1": niah("essay", "words", "numbers", keys=4),
        "niah_multikey_2": niah("needle", "words", "numbers"),
        "niah_multikey_3": niah("needle", "uuids", "uuids"),
        "niah_multivalue": niah("essay", "words", "numbers", values=4),
        "niah_multiquery": niah("essay", "words", "numbers", queries=4),
        "vt": {"family": "variable_tracking", "num_chains": 1, "num_hops": 4},
        "cwe": {"family": "common_words_extraction", "freq_cw": 30, "freq_ucw": 3, "num_cw": 10},
        "fwe": {"family": "freq_words_extraction", "alpha": 2.0, "coded_wordlen": 6},
        "qa_1": {"family": "qa"},
        "qa_2": {"family": "qa"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for folder in ("ruler/wordlists", "haystack", "qa"):
        (data / folder).mkdir(parents=True)
    (data / "ruler/templates.json").write_text(json.dumps(TEMPLATES))
    for kind in ("noun", "adjective", "verb"):
        (data / f"ruler/wordlists/{kind}list.txt").write_text("\n".join(f"{kind}{i}" for i in range(100)))
    (data / "haystack/a.txt").write_text(" ".join(f"It was day {i} of many." for i in range(300)))
    paragraphs = [
        {"context": f"Paragraph {i} says x{i}.", "qas": [
            {"question": f"What says {i}?", "answers": [{"text": f"x{i}"}]},
            {"question": "What not?", "answers": [], "is_impossible": True},
        ]}
        for i in range(80)
    ]  # fmt: skip
    articles = [{"paragraphs": paragraphs[i : i + 4]} for i in range(0, 80, 4)]
    (data / "qa/squad_dev_v2_half.json").write_text(json.dumps({"data": articles}))
    rows = [
        {
            "question": f"Who is {i}?",
            "answer": f"n{i}",
            "context": [[f"T{i}.{j}", ["One. ", f"Is n{i}."]] for j in range(10)],
        }
        for i in range(8)
    ]
    (data / "qa/hotpotqa_train100.json").write_text(json.dumps(rows))
    return TaskOptions(WordTokenizer(), data=data, lengths=(LENGTH,), samples=3)


def whole(document):
    (question,) = document.questions
    return document.context + question.text + question.answer_prefix


@pytest.mark.parametrize("name", RULER_TASKS)
def test_samples_fill_the_length(options, name):
    documents = generate(name, options, LENGTH)
    assert len(documents) == 3 and len({whole(d) for d in documents}) == 3
    assert documents == generate(name, options, LENGTH), "the same seed must give the same samples"
    for document in documents:
        (question,) = document.questions
        tokens = len(options.tokenizer(whole(document)).input_ids) + question.max_new_tokens
        assert 0.6 * LENGTH < tokens <= LENGTH
        assert "{" not in whole(document)
        if name not in ("fwe", "cwe"):
            answers = question.answers if name != "qa_2" else question.answers[:1]
            assert all(answer in document.context for answer in answers)


def test_needles(options):
    (question,) = generate("niah_multivalue", options, LENGTH)[0].questions
    assert len(question.answers) == 4 and "What are all the numbers" in question.text
    document = generate("niah_multiquery", options, LENGTH)[0]
    needles = dict(re.findall(r"magic numbers for (\S+) is: (\d{7})\.", document.context))
    (question,) = document.questions
    keys = re.search(r"for (\S+), (\S+), (\S+), and (\S+)\?", question.text).groups()
    assert [needles[key] for key in keys] == list(question.answers)
    document = generate("niah_multikey_3", options, LENGTH)[0]
    (question,) = document.questions
    key = re.search(r"What is the uuid for (\S+)\?", question.text)[1]
    assert document.context.count(f"for {key} is: {question.answers[0]}.") == 1
    assert document.context.startswith("A special magic uuid is hidden here.")


def test_singular_changes_the_task_only():
    assert (
        singular("Some special magic numbers are hidden. What are all the x")
        == "A special magic numbers is hidden. What is the x"
    )


def test_essay_needles_stand_between_sentences():
    text = " ".join(f"Sentence {i} ends." for i in range(50))
    out = hide_in_essay(["Needle one.", "Needle two."], text, random.Random(1))
    assert re.sub(r" ?Needle (one|two)\.", "", out).strip() == text
    assert out.index("one") < out.index("two") and re.search(r"(^|\. )Needle one\.", out)


def test_distractors_never_have_the_true_key(options):
    task = Niah(options, LENGTH, "niah_multikey_2")
    task._value = lambda kind, rng: f"k{rng.randrange(3)}"  # collisions all the time
    sample = task.make(40, random.Random(0))
    key = re.search(r"for (k\d)", sample.question)[1]
    assert len(re.findall(f"for {key} is", sample.context)) == 1


def test_chain_of_variables(options):
    document = generate("vt", options, LENGTH)[0]
    (question,) = document.questions
    names = question.answers
    value = re.search(r"that are (\d{5})", question.text)[1]
    lines = [line.strip() for line in document.context.split("\n")]
    steps = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
    places = [lines.index(step) for step in steps]
    assert places == sorted(places) and len(set(names)) == 5
    assert "Answer: 5 are 12345: " in document.context, "the solved example comes first"


def test_counts(options):
    document = generate("cwe", options, LENGTH)[0]
    main = document.context.split("Listen.\n")[-1]
    counts = Counter(re.findall(r"\d+\. (\S+)", main))
    assert {word for word, n in counts.items() if n == 6} == set(document.questions[0].answers)
    assert set(counts.values()) == {1, 6}
    document = generate("fwe", options, LENGTH)[0]
    counts = Counter(document.context.removeprefix("Count. ").split())
    assert [word for word, _ in counts.most_common(4)] == ["...", *document.questions[0].answers]


def test_qa_keeps_what_the_question_needs(options):
    documents = generate("qa_2", options, LENGTH)
    for i, document in enumerate(documents):
        assert document.context.count(f"T{i}.") == 10 and document.questions[0].answers == (f"n{i}",)
    assert "What not?" not in "".join(d.questions[0].text for d in generate("qa_1", options, LENGTH))


def test_too_short_a_length_is_refused(options):
    with pytest.raises(ValueError, match="does not fit into 40 tokens"):
        generate("vt", options, 40)
    with pytest.raises(ValueError, match="got 'nothing'"):
        generate("nothing", options, LENGTH)
