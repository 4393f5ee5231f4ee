"""Every method on every document, one JSON line per measurement, resumable.

A document is prefilled once; each method compresses the recorded prefill (``recording``), so all methods see the very
same keys and values. Rows of one (method, document) are written together: a run that was stopped continues after the
last pair that is complete.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from smartkv_ext.cache import SmartKVCache
from smartkv_ext.hf import patch
from smartkv_ext.hf.attention import NAME
from smartkv_ext.reference.layout import kv_bits

from .answer import Decoder
from .items import Document, Question
from .methods import Held, Method, held
from .metrics import mean_kl
from .prompt import split_prompt
from .recording import Recording, record

FORMAT = 1  # of a row
DEFAULTS = 3  # goes up when a method comes to mean something else by default: tiers (2), the basis of keys (3)
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all rows of a run share."""

    model_name: str
    dtype: str
    query_aware: bool = False  # the question is part of what is compressed
    maps: bool = False  # also which token every head kept, and at how many bits
    recordings: Path | None = (
        None  # folder where prefills are kept, so that a run that is continued does not repeat them
    )

    def facts(self) -> Row:
        """Columns of every row."""
        facts = {"model": self.model_name, "dtype": self.dtype, "query_aware": self.query_aware}
        return {"format": FORMAT, "defaults": DEFAULTS, **facts}


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; a last line that was cut off is left out. Raises ValueError for any other line that is no row."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not JSON") from None
        if not isinstance(row, dict) or row.get("format") != FORMAT:
            raise ValueError(f"{path}, line {number}, must be a row of format {FORMAT}")
        rows.append(row)
    return rows


class Results:
    """A JSONL file and what it already has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = read_rows(path)
        if any(row.get("defaults", 1) != DEFAULTS for row in rows):
            raise ValueError(f"{path} has rows measured with other defaults of the methods: name a new file")
        self.done = Counter(self.key(row) for row in rows)  # rows of each measurement
        self._cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")

    @staticmethod
    def key(row: Row) -> tuple[Any, ...]:
        """What must not be measured twice."""
        return tuple(row[name] for name in ("model", "dtype", "query_aware", "task", "document", "method"))

    def write(self, rows: Sequence[Row]) -> None:
        """Append complete lines in one write; a line that an earlier run left open goes."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        if self._cut_off:
            whole = self.path.read_bytes()
            self.path.write_bytes(whole[: whole.rfind(b"\n") + 1])
            self._cut_off = False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.done.update(self.key(row) for row in rows)


@contextmanager
def _patched(model: Any) -> Iterator[None]:
    if model.config._attn_implementation == NAME:
        yield
        return
    with patch(model):
        yield


def evaluate(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document],
    methods: Sequence[Method],
    results: Results,
    settings: Settings,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Measure what ``results`` lacks. Raises ValueError for a method that the model cannot have."""
    with _patched(model):
        decoder = Decoder(model, tokenizer)
        for document in documents:
            shared = settings.facts() | {"task": document.task, "document": document.name}
            there = [results.done[Results.key({**shared, "method": m.spec})] for m in methods]
            missing = [m for m, rows in zip(methods, there, strict=True) if not rows]
            if len(missing) < len(methods):
                skipped = f"{len(methods) - len(missing)} of {len(methods)} methods skipped"
                known = f"{results.path.name} has their rows already ({sum(there)})"
                say(f"{document.task} {document.name} | {skipped}: {known}")
            if not missing:
                continue
            bench = _Bench(decoder, document, settings)
            for method in missing:
                rows = bench.rows_or_failure(method)
                results.write([shared | document.facts | row for row in rows])
                say(f"{document.task} {document.name} | {method.spec} | {_summary(rows)}")


def _summary(rows: Sequence[Row]) -> str:
    if rows[0]["kind"] == "failed":
        return f"failed: {rows[0]['error']}"
    parts = [f"ratio {rows[0]['ratio']:.4f}"]
    for name in ("kl", "score"):
        values = [row[name] for row in rows if name in row]
        if values:
            parts.append(f"{name} {sum(values) / len(values):.5f}")
    return ", ".join(parts)


class _Bench:
    """One document: its exact prefill, and the full cache's predictions."""

    def __init__(self, decoder: Decoder, document: Document, settings: Settings) -> None:
        self.decoder, self.document, self.settings = decoder, document, settings
        self.parts = [self._split(question) for question in document.questions]
        self._recording: tuple[torch.Tensor, Recording, float] | None = None
        self._full: torch.Tensor | None = None

    def _split(self, question: Question) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is compressed, what follows), both (1, n)."""
        prompt = split_prompt(
            self.decoder.tokenizer, self.document.context, question.text, question.answer_prefix, self.document.chat
        )
        if not self.settings.query_aware:
            return prompt.document, prompt.question
        whole = torch.cat([prompt.document, prompt.question], 1)
        return whole[:, :-1], whole[:, -1:]

    def _record(self, ids: torch.Tensor) -> tuple[Recording, float]:
        """The prefill of ids and its CPU seconds; the last one is remembered."""
        if self._recording is None or not torch.equal(self._recording[0], ids):
            self._recording = None  # free it first
            start = time.process_time()
            recording = self._known_or_new(ids)
            self._recording = ids, recording, time.process_time() - start
        return self._recording[1:]

    def _known_or_new(self, ids: torch.Tensor) -> Recording:
        folder, settings = self.settings.recordings, self.settings
        if folder is None:
            return record(self.decoder.model, ids)
        key = f"{settings.model_name} {settings.dtype} {ids.tolist()}"
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        if not path.exists():
            record(self.decoder.model, ids).save(path)
        return Recording.load(path)

    def rows_or_failure(self, method: Method) -> list[Row]:
        """A rival that cannot do what it is asked gets a row that says so; our own errors are raised."""
        try:
            return self.rows(method)
        except (RuntimeError, ImportError) as error:
            if not method.is_rival:
                raise
            return [{"kind": "failed", "method": method.spec, "error": " ".join(str(error).split())[:200]}]

    def rows(self, method: Method) -> list[Row]:
        """All measurements of a method."""
        rows = []
        if self.document.continuation is not None:
            assert self.document.ids is not None, "a continuation continues ids"
            rows.append(self._continuation_row(method, self.document.ids, self.document.continuation))
        done: tuple[torch.Tensor, Any, Row] | None = None
        for question, (ids, rest) in zip(self.document.questions, self.parts, strict=True):
            if done is None or not torch.equal(done[0], ids):
                done = ids, *self._compress(method, ids)
            start = time.process_time()
            own = self._copy(done[1], method, ids)
            found, seen = self.decoder.ask(own, rest, question, ids.shape[1])
            size = held(own, self._record(ids)[0], seen)
            cost = {
                "answer_seconds": time.process_time() - start,
                "answer_bytes": size.num_bytes,
                "answer_ratio": size.ratio,
                "answer_tokens": seen - ids.shape[1],
            }
            facts = {"question": question.name, "metric": question.metric, "answers": list(question.answers)}
            rows.append({"kind": "question", **done[2], **facts, **question.facts, **found, **cost})
        if self.settings.maps and done is not None and isinstance(done[1], SmartKVCache):
            rows.append({"kind": "map", **done[2], **self._map(done[1], done[0])})
        return rows

    def _copy(self, cache: Cache, method: Method, ids: torch.Tensor) -> Cache:
        """A cache that a question may change."""
        try:
            return copy.deepcopy(cache)
        except RuntimeError:  # quanto's tensors cannot be copied
            return method.prefill(self.decoder.model, self._record(ids)[0])

    def _compress(self, method: Method, ids: torch.Tensor) -> tuple[Any, Row]:
        recording, prefill_seconds = self._record(ids)
        start = time.process_time()
        cache = method.prefill(self.decoder.model, recording)
        seconds = time.process_time() - start
        size = held(cache, recording, recording.num_tokens)
        return cache, _columns(method, size) | {
            "tokens": recording.num_tokens, "prefill_seconds": prefill_seconds, "compress_seconds": seconds,
        }  # fmt: skip

    def _continuation_row(self, method: Method, ids: torch.Tensor, continuation: torch.Tensor) -> Row:
        if self._full is None:
            full, _ = self._compress(Method("full"), ids)
            self._full = self.decoder.log_probabilities(full, continuation, ids.shape[1])
        cache, row = self._compress(method, ids)
        start = time.process_time()
        ours = self.decoder.log_probabilities(cache, continuation, ids.shape[1])
        cost = time.process_time() - start
        target = continuation[0, 1:, None]
        return row | {
            "kind": "text",
            "kl": mean_kl(self._full, ours),
            "nll": -ours[:-1].gather(1, target).mean().item(),
            "full_nll": -self._full[:-1].gather(1, target).mean().item(),
            "top1": (self._full.argmax(-1) == ours.argmax(-1)).float().mean().item(),
            "scored_tokens": continuation.shape[1],
            "answer_seconds": cost,
        }

    def _map(self, cache: SmartKVCache, ids: torch.Tensor) -> Row:
        """Tenths of bits of each token in each head (layers, heads, tokens), 0: evicted; and the tokens' texts."""
        bits = torch.stack([_kept_bits(layer, ids.shape[1]) for layer in cache.layers])
        packed = zlib.compress(bits.numpy().tobytes(), 9)
        texts = token_texts(self.decoder.tokenizer, ids[0].tolist())
        encoded = base64.b64encode(packed).decode()
        return {"map": encoded, "map_shape": list(bits.shape), "map_unit": 10, "token_texts": texts}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token; a character that several tokens make up belongs to the last of them."""
    out: list[str] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[begin:end]))
        half = text.endswith("\ufffd") and end - begin < 4  # UTF-8 has at most 4 bytes, a token at least 1
        out.append("" if half else text)
        begin = begin if half else end
    return out


def _kept_bits(layer: Any, tokens: int) -> torch.Tensor:
    """(num_kv_heads, tokens) uint8 of the first sequence, in tenths: mean of keys and values."""
    heads = layer.window.shape[1]
    out = torch.zeros(heads, tokens, dtype=torch.uint8)
    dense = layer.window.held_positions()[0]
    out[:, dense[dense >= 0].long()] = 160
    positions = layer.store.positions()[0]
    for t, tier in enumerate(layer.config.quant.tiers):
        for h in range(heads):
            at = positions[h, t]
            out[h, at[at >= 0].long()] = 5 * sum(kv_bits(tier))
    return out


def _columns(method: Method, size: Held) -> Row:
    return {
        "method": method.spec,
        "family": method.family,
        "budget": method.options.get("budget"),
        "bytes": size.num_bytes,
        "full_bytes": size.full_bytes,
        "ratio": size.ratio,
        "kept": size.kept,
    }
