"""The report holds what the rows say, and opens without a network."""

import base64
import json
import re
import zlib

import pytest
import torch

from python_tests.eval.tokenizer import WordTokenizer
from python_tests.hf.tiny import tiny
from smartkv_ext.eval.methods import get_method
from smartkv_ext.eval.report import data, write_report
from smartkv_ext.eval.report.figures import readable_ticks
from smartkv_ext.eval.report.maps import KeptMap
from smartkv_ext.eval.runner import Results, Settings, evaluate, read_rows, token_texts
from smartkv_ext.eval.tasks import TaskOptions, get_documents

OURS = [f"smartkv policy=keydiff budget={b} window=16" for b in (0.25, 0.125)]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "words.txt").write_text(" ".join(f"word{i % 83}" + "." * (i % 9 == 0) for i in range(4000)))
    options = TaskOptions(WordTokenizer(), texts=(f"{folder}/words.txt",), lengths=(300,), scored=40)
    methods = [get_method(spec) for spec in ["full", "uniform bits=2 window=16", *OURS]]
    model = tiny("qwen2").to(torch.bfloat16)
    documents = get_documents(["text", "recall"], options)
    evaluate(model, options.tokenizer, documents, methods, Results(folder / "a.jsonl"), Settings("a", "b", maps=True))
    return folder / "a.jsonl"


def test_page(rows_file, tmp_path):
    out = tmp_path / "report.html"
    write_report([rows_file], out)
    html = out.read_text()
    assert not re.search(r'(src|href)="?https?:', html) and "@import" not in html
    kl = next(r["kl"] for r in read_rows(rows_file) if r["kind"] == "text" and r["method"].startswith("uniform"))
    assert f">{kl:.4f}<" in html and "uniform window=16" in html
    assert html.count("<svg") == 2 + 2 * 3  # KL, recall; two for each map
    embedded = re.search(r'<script id="maps" type="application/json">(.*?)</script>', html, re.S)[1]
    assert len(json.loads(embedded)) == 3


def test_summaries_average_by_method():
    base = {"model": "m", "dtype": "d", "query_aware": False, "family": "f", "budget": None, "method": "f"}
    text = {"kind": "text", "task": "text", "top1": 1.0, "full_nll": 2.0}
    rows = [
        {**base, **text, "kl": 0.1, "nll": 2.0, "ratio": 0.25},
        {**base, **text, "kl": 0.3, "nll": 2.2, "ratio": 0.23},
        {**base, "kind": "question", "task": "recall", "score": 0.0, "ratio": 0.24, "depth": 5, "length": 99},
        {**base, "kind": "question", "task": "recall", "score": 1.0, "ratio": 0.24, "depth": 5, "length": 99},
    ]
    (found,) = data.summaries(rows)
    assert found.values["kl"] == pytest.approx(0.2)
    assert found.values["perplexity"] == pytest.approx(2.718281828**0.1) and found.values["recall"] == 0.5
    (grid,) = data.needles(rows)
    assert grid.cells == [[0.5]]


def test_values_have_the_bytes_of_their_own_rows(tmp_path):
    """Eight questions at 56 % do not move the point of one text at 52 %."""
    base = {"format": 1, "model": "m", "dtype": "d", "query_aware": False, "family": "f", "budget": None, "method": "f"}
    text = {"kind": "text", "task": "text", "top1": 0.9, "full_nll": 2.0, "nll": 2.1, "kl": 0.1, "ratio": 0.52}
    question = {"kind": "question", "task": "recall", "score": 1.0, "ratio": 0.56, "depth": 5, "length": 99}
    rows = [{**base, **text}, *[{**base, **question}] * 8]
    (found,) = data.summaries(rows)
    assert found.ratios == pytest.approx({"kl": 0.52, "top1": 0.52, "perplexity": 0.52, "recall": 0.56})
    source, out = tmp_path / "rows.jsonl", tmp_path / "report.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([source], out)
    table = re.search(r'<table class="results">.*?</table>', out.read_text(), re.S)[0]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", table)
    assert cells[1:7] == ["text bytes", "KL", "ppl / full", "top-1", "recall bytes", "recall"]
    assert cells[-6:] == ["52.0 %", "0.1000", "1.105", "90.0 %", "56.0 %", "100.0 %"]


@pytest.mark.parametrize("low, high", [(0.00355, 0.00372), (0.002, 0.03), (1e-6, 3.0), (1e-14, 1.0), (1.0002, 1.0009)])
def test_ticks_can_be_read(low, high):
    ticks = readable_ticks(low, high)
    assert 2 <= len(ticks) <= 9 and all(low <= tick <= high for tick in ticks)
    labels = {f"{tick:.6g}" for tick in ticks}
    assert len(labels) == len(ticks) and max(map(len, labels)) <= 7


def test_notable_families_are_the_best_ones():
    found = [
        data.Summary(f"{name}{i}", name, None, {"kl": kl}, {"kl": ratio})
        for i, (name, ratio, kl) in enumerate([("good", 0.1, 0.1), ("bad", 0.1, 0.2), ("bad", 0.2, 0.15)])
    ]
    assert data.notable_families(found) == ["good"]


def test_map_for_the_browser(rows_file):
    kept = KeptMap.from_row(next(row for row in read_rows(rows_file) if row["kind"] == "map"))
    raw = kept.for_browser()
    layers, tokens = raw["layers"], raw["tokens"]
    values = torch.frombuffer(bytearray(base64.b64decode(raw["data"])), dtype=torch.uint8).view(2, layers + 1, tokens)
    assert torch.equal(values[0, :layers] == 0, (kept.bits > 0).sum(1) == 0)
    assert values[1, 0, 0] == 160  # a sink
    assert sum(share.mean().item() for share in kept.tier_shares().values()) == pytest.approx(1)


def test_maps_of_whole_bits():
    """As rows had them before tiers with more bits for keys than for values."""
    packed = base64.b64encode(zlib.compress(bytes([0, 3, 4, 16]))).decode()
    row = {"method": "full", "task": "a", "document": "b", "ratio": 1.0, "token_texts": list("abcd"), "map": packed}
    kept = KeptMap.from_row(row | {"map_shape": [1, 1, 4]})
    assert kept.tier_shares().keys() == {0, 3, 4, 16}


def test_token_texts_join_split_characters():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    assert token_texts(Bytes(), list("aé€b".encode())) == ["a", "", "é", "", "", "€", "b"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="there are none"):
        write_report([tmp_path / "no.jsonl"], tmp_path / "out.html")
