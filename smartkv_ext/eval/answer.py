"""What a compressed document still gives: next-token distributions, and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from smartkv_ext.hf import cache_kwargs

from .items import Question
from .metrics import METRICS, MONOTONE


@dataclass(frozen=True)
class Decoder:
    """A patched model and its tokenizer."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def logits(self, cache: Cache, ids: torch.Tensor, start: int, last: int = 0) -> torch.Tensor:
        """(n, vocab) after ids (1, n) at positions from ``start`` on; ``last``: of the last tokens only.

        Positions are given: a cache that evicts may count only what it keeps.
        """
        positions = torch.arange(start, start + ids.shape[1])[None]
        out: torch.Tensor = self.model(
            ids, **cache_kwargs(cache), position_ids=positions, use_cache=True, logits_to_keep=last
        ).logits[0]
        return out

    def log_probabilities(self, cache: Cache, ids: torch.Tensor, start: int) -> torch.Tensor:
        """(n, vocab) float32."""
        return self.logits(cache, ids, start).float().log_softmax(-1)

    def ask(self, cache: Cache, prompt: torch.Tensor, question: Question, start: int) -> tuple[dict[str, Any], int]:
        """Score of a question whose ids ``prompt`` (1, n) follow the ``start`` tokens of a cache, and the tokens that
        it has then seen: the cache takes question and answer in."""
        if question.metric == "forced":
            return self._forced(cache, prompt, question, start)
        text, end = self.generate(cache, prompt, question, start)
        scored = text.strip().partition("\n")[0] if question.first_line else text
        score = METRICS[question.metric](scored, question.answers, question.facts)
        return {"score": score, "prediction": text}, end

    def _forced(self, cache: Cache, prompt: torch.Tensor, question: Question, start: int) -> tuple[dict[str, Any], int]:
        """Feed the answer and compare with what greedy decoding would have said at each of its tokens."""
        answer = self.tokenizer(question.answers[0], add_special_tokens=False).input_ids
        ids = torch.cat([prompt, torch.tensor([answer[:-1]], dtype=torch.int64)], 1)
        logs = self.logits(cache, ids, start, last=len(answer)).float().log_softmax(-1)
        greedy = logs.argmax(-1)
        nll = -logs.gather(1, torch.tensor(answer)[:, None]).mean().item()
        text = self.tokenizer.decode(greedy)
        found = {"score": float(greedy.tolist() == answer), "answer_nll": nll, "prediction": text}
        return found, start + ids.shape[1]

    def generate(self, cache: Cache, prompt: torch.Tensor, question: Question, start: int) -> tuple[str, int]:
        """Greedy text, and the tokens that the cache has then seen."""
        stop = self._stop_tokens()
        ids: list[int] = []
        step = prompt
        text: str = ""
        while len(ids) < question.max_new_tokens:
            token = int(self.logits(cache, step, start, last=1)[-1].argmax())
            start += step.shape[1]
            if token in stop:
                break
            ids.append(token)
            step = torch.tensor([[token]])
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            cut = [text.find(s) for s in question.stop if s in text]
            if cut:
                text = text[: min(cut)]
                break
            if question.metric in MONOTONE and METRICS[question.metric](text, question.answers, question.facts) == 1:
                break  # more text cannot change the score
        return text, start

    def _stop_tokens(self) -> set[int]:
        named = self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id
        return {i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])}
