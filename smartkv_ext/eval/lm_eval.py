"""Models with a compressed cache for EleutherAI's lm-evaluation-harness.

    from smartkv_ext.eval.lm_eval import language_model
    lm_eval.simple_evaluate(language_model(model, tokenizer, "smartkv policy=snapkv budget=0.25"), tasks=["gsm8k"])

The harness scores a continuation in one forward and would never touch a cache; here every context is prefilled and
compressed first, and what is scored or generated follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from smartkv_ext.hf import patch
from smartkv_ext.hf.attention import NAME

from .answer import Decoder
from .items import Question
from .methods import Held, get_method, held
from .prompt import tokenize
from .recording import record


class CompressedModel:
    """The three requests of the harness. ``held`` says what the last context took."""

    def __init__(self, model: Any, tokenizer: Any, method: str, max_new_tokens: int = 256) -> None:
        self.decoder, self.method, self.max_new_tokens = Decoder(model, tokenizer), get_method(method), max_new_tokens
        self.held: Held | None = None

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each (context, continuation)."""
        return [self._score(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """Log-likelihood of each text's second half after its compressed first half."""
        out = []
        for request in requests:
            ids = self._ids(request.args[0])
            half = max(ids.shape[1] // 2, 2)
            out.append(self._score_ids(ids[:, :half], ids[:, half:])[0])
        return out

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        """Greedy text after each context, up to the first of its stop strings."""
        out = []
        for request in requests:
            context, options = request.args
            stop = options.get("until") or ()
            question = Question(
                name="", text="", answers=("",), metric="qa_f1", stop=(stop,) if isinstance(stop, str) else tuple(stop),
                max_new_tokens=options.get("max_gen_toks", self.max_new_tokens),
            )  # fmt: skip
            ids = self._ids(context)
            with self._patched():
                cache = self._compress(ids[:, :-1])
                out.append(self.decoder.generate(cache, ids[:, -1:], question, ids.shape[1] - 1)[0])
        return out

    def _ids(self, text: str) -> torch.Tensor:
        ids = tokenize(self.decoder.tokenizer, text, special=True)
        if ids.shape[1] < 3:
            raise ValueError(f"a context must have at least 3 tokens to be compressed; got {text!r}")
        return ids

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        whole = self._ids(context + continuation)
        begin = min(self._ids(context).shape[1], whole.shape[1] - 1)
        return self._score_ids(whole[:, :begin], whole[:, begin:])

    def _score_ids(self, context: torch.Tensor, continuation: torch.Tensor) -> tuple[float, bool]:
        """The context's last token is fed uncompressed: it predicts the continuation's first."""
        with self._patched():
            cache = self._compress(context[:, :-1])
            fed = torch.cat([context[:, -1:], continuation[:, :-1]], 1)
            logs = self.decoder.log_probabilities(cache, fed, context.shape[1] - 1)
        right = logs.gather(1, continuation[0, :, None])
        return right.sum().item(), bool((logs.argmax(-1) == continuation[0]).all())

    def _compress(self, ids: torch.Tensor) -> Any:
        recording = record(self.decoder.model, ids)
        cache = self.method.prefill(self.decoder.model, recording)
        self.held = held(cache, recording, recording.num_tokens)
        return cache

    def _patched(self) -> Any:
        model = self.decoder.model
        if model.config._attn_implementation == NAME:
            raise ValueError("model must not be patched: the adapter patches it for each request")
        return patch(model)


def language_model(model: Any, tokenizer: Any, method: str, max_new_tokens: int = 256) -> Any:
    """A ``lm_eval.api.model.LM``. Raises ImportError without the harness."""
    from lm_eval.api.model import LM  # type: ignore[import-not-found, import-untyped, unused-ignore]

    kind = type("SmartKVLM", (CompressedModel, LM), {})
    return kind(model, tokenizer, method, max_new_tokens)
