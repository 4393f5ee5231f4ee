"""LongBench, GSM8K and documents from local files."""

import json

import pytest

from python_tests.eval.tokenizer import WordTokenizer
from smartkv_ext.eval.tasks import TaskOptions, get_documents
from smartkv_ext.eval.tasks.longbench import cut_middle


@pytest.fixture
def folder(tmp_path):
    prompt = {
        "prompt": "Read. {context} Now: {input}\nAnswer:", "max_new_tokens": 9, "metric": "qa_f1",
        "chat_template": False, "first_line_only": True,
    }  # fmt: skip
    (tmp_path / "prompts_en.json").write_text(json.dumps({"trec": prompt, "other": prompt}))
    rows = [{"input": f"in{i}", "context": "word " * 50, "answers": ["a"], "_id": f"r{i}"} for i in range(3)]
    (tmp_path / "trec.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_longbench(folder):
    options = TaskOptions(WordTokenizer(), data=folder, lengths=(30, 400), samples=2)
    documents = list(get_documents(["longbench"], options))
    assert [d.name for d in documents] == ["trec/30/r0", "trec/30/r1", "trec/400/r0", "trec/400/r1"]
    (question,) = documents[3].questions
    assert question.text == " Now: in1\nAnswer:" and question.first_line and not documents[3].chat
    assert len(options.tokenizer(documents[0].context + documents[0].questions[0].text).input_ids) <= 30
    assert documents[3].context == "Read. " + "word " * 50
    (folder / "trec.jsonl").write_text('{"input": ""}')
    with pytest.raises(ValueError, match="line 1, has no context, answers"):
        list(get_documents(["longbench"], options))
    (folder / "new.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"'new' needs new\.jsonl and a prompt"):
        list(get_documents(["longbench"], options))


def test_cut_middle_keeps_both_ends():
    text = " ".join(map(str, range(100)))
    assert cut_middle(WordTokenizer(1000), text, " a b", 20).split() == [
        *map(str, range(10)),
        *map(str, range(92, 100)),
    ]


def test_gsm8k(tmp_path):
    rows = [{"question": "How many?", "answer": "Some. \n#### 1,234"}]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (document,) = get_documents(["gsm8k"], TaskOptions(WordTokenizer(), data=tmp_path, samples=5))
    assert document.questions[0].answers == ("1234",) and document.context.endswith("How many?\n")


def test_documents_keep_questions_whose_evidence_is_there(tmp_path):
    (tmp_path / "a.txt").write_text("one two\nthree four five six")
    rows = [
        {"id": "x", "file": "a.txt", "question": "Q", "answer": "3", "evidence": "two three"},
        {"id": "y", "file": "a.txt", "question": "Q", "answer": "6", "evidence": "five six"},
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (document,) = get_documents(["documents"], TaskOptions(WordTokenizer(), data=tmp_path, lengths=(4,)))
    assert [q.name for q in document.questions] == ["x"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no ruler/templates\.json or templates\.json"):
        list(get_documents(["ruler"], TaskOptions(WordTokenizer(), data=tmp_path)))
    with pytest.raises(ValueError, match="data must be a folder"):
        list(get_documents(["gsm8k"], TaskOptions(WordTokenizer())))
    with pytest.raises(ValueError, match="task must be one of"):
        list(get_documents(["nothing"], TaskOptions(WordTokenizer())))
