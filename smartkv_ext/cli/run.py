"""Prefill, compress, ask, answer: with a SmartKVCache, and with the full cache to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

import smartkv_ext
from smartkv_ext.cache import CacheReport, SmartKVCache
from smartkv_ext.eval.prompt import Prompt
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.hf.patching import attention_modules
from smartkv_ext.policies import get_policy
from smartkv_ext.quant import QuantSpec, default_tiers
from smartkv_ext.reference.layout import tier_name

Advance = Callable[[float], None]  # told how many more tokens have gone through the model
Emit = Callable[[str], None]  # told the next piece of the answer


@dataclass(frozen=True)
class Settings:
    """How to compress and how to answer."""

    budget: float | str | None = 0.125
    policy: str = "auto"
    tiers: Sequence[int | str] | None = None  # None: those of the cache
    window: int = 128
    sinks: int = 4
    scope: str = "head"
    max_new_tokens: int = 128
    chunk: int = 4096  # tokens of the document per forward pass
    one_line: bool = False  # an answer ends with its first line

    @property
    def tier_names(self) -> list[str]:
        """Ascending, as people write them."""
        tiers = self.tiers or default_tiers(get_policy(self.policy).evicts)
        return [tier_name(tier) for tier in QuantSpec.create(tiers, "gaussian", True).tiers]

    def new_cache(self, config: Any) -> SmartKVCache:
        """An empty cache. Raises ValueError naming the argument that is wrong."""
        return SmartKVCache(
            config, budget=self.budget, policy=self.policy, tiers=self.tiers, sinks=self.sinks, window=self.window,
            scope=self.scope,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer and what it took. Speeds are tokens per second; a speed of 0 means that nothing was timed."""

    text: str
    token_ids: list[int]
    finished: bool  # the answer ended by itself, not at max_new_tokens
    prefill_seconds: float  # of the document, compression included
    question_seconds: float
    decode_seconds: float
    prefill_speed: float
    decode_speed: float
    after_document: dict[str, Any]  # cache report
    after_answer: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def answer_compressed(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    settings: Settings,
    advance: Advance | None = None,
    emit: Emit | None = None,
) -> Answer:
    """Answer with a SmartKVCache; the model is as before afterwards."""
    with smartkv_ext.patch(model):
        return _answer(model, tokenizer, prompt, settings, settings.new_cache(model.config), advance, emit)


def answer_full(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    settings: Settings,
    advance: Advance | None = None,
    emit: Emit | None = None,
) -> Answer:
    """Answer with the cache and the attention that transformers itself would use."""
    return _answer(model, tokenizer, prompt, settings, DynamicCache(config=model.config), advance, emit)


def describe(cache: Cache) -> dict[str, Any]:
    """Bytes of a cache as they are, and of the same tokens in a full bf16 cache."""
    if isinstance(cache, SmartKVCache):
        report: CacheReport = cache.report()
        return report.to_dict()
    layers: Any = cache.layers
    tensors: list[torch.Tensor] = [x for layer in layers for x in (layer.keys, layer.values)]
    return {
        "total_bytes": sum(x.nbytes for x in tensors),
        "full_bytes": sum(x.numel() for x in tensors) * torch.bfloat16.itemsize,
        "tokens_seen": cache.get_seq_length(),
    }


@torch.inference_mode()
def _answer(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    settings: Settings,
    cache: Cache,
    advance: Advance | None,
    emit: Emit | None,
) -> Answer:
    start = time.perf_counter()
    _prefill(model, prompt.document, settings.chunk, cache, advance)
    prefilled = time.perf_counter()
    after_document = describe(cache)
    asked = time.perf_counter()
    logits = model(prompt.question, **cache_kwargs(cache), use_cache=True, logits_to_keep=1).logits
    first = time.perf_counter()
    stop, stream, ids = _stop_tokens(model, tokenizer), _Stream(tokenizer, emit), list[int]()
    finished = False
    while len(ids) < settings.max_new_tokens:
        token = int(logits[0, -1].argmax())
        if token in stop:
            finished = True
            break
        if settings.one_line and "\n" in tokenizer.decode([token]) and ids:
            finished = True
            break
        ids.append(token)
        stream.show(ids)
        if len(ids) < settings.max_new_tokens:
            step = torch.tensor([[token]], device=prompt.question.device)
            logits = model(step, **cache_kwargs(cache), use_cache=True, logits_to_keep=1).logits
    end = time.perf_counter()
    text = stream.end(ids)
    steps = len(ids) if finished else len(ids) - 1  # the first token comes from the question's own forward pass
    return Answer(
        text=text, token_ids=ids, finished=finished, prefill_seconds=prefilled - start, question_seconds=first - asked,
        decode_seconds=end - first, prefill_speed=prompt.document.shape[1] / (prefilled - start),
        decode_speed=max(steps, 0) / (end - first), after_document=after_document, after_answer=describe(cache),
    )  # fmt: skip


def _prefill(model: Any, ids: torch.Tensor, chunk: int, cache: Cache, advance: Advance | None) -> None:
    """Run the document through the model; progress is reported layer by layer."""
    layers = list(attention_modules(model))
    for piece in ids.split(chunk, dim=1):
        share = piece.shape[1] / max(len(layers), 1)
        with ExitStack() as hooks:
            if advance is not None:
                for layer in layers:
                    hooks.callback(layer.register_forward_hook(_Progress(advance, share)).remove)
            model(piece, **cache_kwargs(cache), use_cache=True, logits_to_keep=1)


class _Progress:
    """A forward hook that reports a layer's share of a chunk."""

    def __init__(self, advance: Advance, share: float) -> None:
        self._advance, self._share = advance, share

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._advance(self._share)


class _Stream:
    """Gives out the text that new tokens add, once it is certain: half a character is held back."""

    def __init__(self, tokenizer: Any, emit: Emit | None) -> None:
        self._tokenizer, self._emit, self._shown = tokenizer, emit, 0

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def show(self, ids: list[int]) -> None:
        """Emit what the newest token adds."""
        if self._emit is None:
            return
        text = self._decode(ids)
        if not text.endswith("\ufffd"):
            self._emit(text[self._shown :])
            self._shown = len(text)

    def end(self, ids: list[int]) -> str:
        """Emit the rest and return the whole text, as it was shown."""
        text = self._decode(ids)
        if self._emit is not None:
            self._emit(text[self._shown :])
        return text.strip()


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the generation config may name several."""
    found: set[int] = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if ids is not None:
            found |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return found
