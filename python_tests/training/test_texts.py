"""Sources of text: who belongs to which split, what a data set remembers of its documents, the hub."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hf.tiny import write_model

from training import collect
from training.collect import collect_shards, plan
from training.dataset import TokenSet
from training.recipe import Recipe
from training.texts import BUNDLE, Mixture, Source

TEXT = "\n\n".join(f"Chapter {i}. The number {i * 7919} was written on door {i * i}." for i in range(300))


def exercises(path, numbers):
    path.write_text("\n".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) for i in numbers))
    return str(path)


def texts_of(name, split, share):
    return {document.text for document in Source.read(name, split, share).documents}


def test_added_documents_move_no_other(tmp_path):
    few, more = exercises(tmp_path / "few.jsonl", range(300)), exercises(tmp_path / "more.jsonl", range(-500, 900))
    train, valid = (texts_of(few, split, 0.1) for split in ("train", "valid"))
    assert not train & valid and 15 < len(valid) < 45 and len(train | valid) == 300
    assert valid < texts_of(more, "valid", 0.1) and train < texts_of(more, "train", 0.1)


def test_every_split_has_a_document(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(TEXT[i * 3000 :])
    assert len(texts_of(str(tmp_path), "valid", 1e-9)) == 1 and len(texts_of(str(tmp_path), "train", 1e-9)) == 2
    assert len(texts_of(str(tmp_path), "valid", 1.0)) == 3
    for share, sentence in ((1.0, "at least 4 documents to split; got 3"), (1 - 1e-12, "at least 4 documents")):
        with pytest.raises(ValueError, match=sentence):
            Source.read(str(tmp_path), "train", share)
    with pytest.raises(ValueError, match="does not exist: name a file, a folder, hub:OWNER/NAME, or stdlib"):
        Source.read(str(tmp_path / "none"), "train", 0.1)


def test_short_documents_are_joined_and_pieces_stay_in_theirs(tmp_path):
    (tmp_path / "long.txt").write_text(TEXT)
    exercises(tmp_path / "short.jsonl", range(400))
    source = Source.read(str(tmp_path), "valid", 1.0)
    bundled = source.bundled(1000)
    sizes = [len(document.text) for document in bundled.documents]
    assert sum(len(d.text) - 2 * (d.text.count("What is") - 1) for d in bundled.documents if "What" in d.text) == sum(
        len(d.text) for d in source.documents if "What" in d.text
    ), "nothing is lost or doubled"
    assert len(sizes) == 3 and min(sizes) >= 1000 and sorted(sizes)[1] >= BUNDLE * 1000
    assert len({document.number for document in bundled.documents}) == 3
    write_model(tmp_path / "model", TEXT)
    _, tokenizer = collect.load(str(tmp_path / "model"), "float32")
    mixture = Mixture([bundled], [1.0])
    for seed in range(20):
        ids, document = mixture.piece(tokenizer, str(seed), 48)
        assert len(ids) == 48 and tokenizer.decode(ids).strip()[:20] in document.text
    (again, _), (other, _) = mixture.piece(tokenizer, "19", 48), mixture.piece(tokenizer, "x", 48)
    assert again.equal(ids) and not other.equal(ids)


def test_foreign_jsonl_in_a_folder_is_skipped(tmp_path):
    exercises(tmp_path / "math.jsonl", range(5))
    (tmp_path / "index.jsonl").write_text('{"title": "Emma", "words": 160000}\n')
    with pytest.warns(UserWarning, match="'index.jsonl' must hold exercises or texts .*; it is skipped"):
        assert len(texts_of(str(tmp_path), "valid", 1.0)) == 5
    with pytest.raises(ValueError, match=r"'index.jsonl' must hold"):
        Source.read(str(tmp_path / "index.jsonl"), "valid", 1.0)


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"text": f"{TEXT} {i}", "author": "x"} for i in range(30)])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("training.hub.MOST_CHARS", 12.5 * len(TEXT))
    assert len(texts_of("hub:deepmind/pg19", "valid", 1.0)) == 13, "the rest is not read"
    assert texts_of("hub:openai/gsm8k:main", "valid", 1.0)
    assert asked == [((name, config), {"split": "train", "streaming": True}) for name, config in (
        ("deepmind/pg19", None), ("openai/gsm8k", "main")
    )]  # fmt: skip


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="source 'hub:a/b' cannot be read from the hub: offline"):
        Source.read("hub:a/b", "train", 0.1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="source 'hub:a/b' needs the package datasets: pip install datasets"):
        Source.read("hub:a/b", "train", 0.1)


@pytest.fixture
def judged(tmp_path):
    """A recipe that holds out everything, its data set, and the file of its documents."""
    write_model(tmp_path / "model", TEXT)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[5000:])
    recipe = Recipe(model=str(tmp_path / "model"), dtype="float32", sources={str(tmp_path / "a.txt"): 1.0,
                    str(tmp_path / "b.txt"): 1.0}, length=48, tokens=8 * 48, valid_share=1.0)  # fmt: skip
    assert collect_shards(recipe, tmp_path / "shards", quiet=True) == 0
    return recipe, tmp_path / "shards", tmp_path / "a.txt"


def test_everything_can_be_held_out(judged):
    recipe, folder, _ = judged
    assert [shard.split for shard in plan(recipe)] == ["valid"]
    facts = json.loads((folder / "dataset.json").read_text())
    tokens = TokenSet.load(folder, "valid", [])
    found = {facts["held_out"][str(number)] for number in tokens.documents.tolist()}
    assert found == {"a.txt/0", "b.txt/0"}


def test_a_data_set_remembers_its_documents(judged):
    recipe, folder, text = judged
    more = replace(recipe, tokens=16 * 48)
    before = text.read_text()
    text.write_text(before + " A line more.")
    with pytest.raises(ValueError, match=r"the documents of .* have changed since: name another folder with --out"):
        collect_shards(more, folder, quiet=True)
    text.write_text(before)
    assert collect_shards(more, folder, quiet=True) == 0 and len(list(folder.glob("valid-*"))) == 2


def test_an_older_data_set_is_read_but_not_added_to(judged):
    recipe, folder, _ = judged
    path = folder / "dataset.json"
    facts = json.loads(path.read_text())
    path.write_text(
        json.dumps({"format": 1, **{k: facts[k] for k in facts if k not in ("format", "documents", "held_out")}})
    )
    assert collect_shards(recipe, folder, quiet=True) == 0 and TokenSet.load(folder, "valid", []).count > 0
    with pytest.raises(ValueError, match=r"collected by an older version, .* train and evaluate on what is there"):
        collect_shards(replace(recipe, tokens=16 * 48), folder, quiet=True)
