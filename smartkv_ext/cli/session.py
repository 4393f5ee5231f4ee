"""One run of `generate` or `demo`: load, check, answer, show."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smartkv_ext import ops
from smartkv_ext.policies import get_policy
from smartkv_ext.quant import QuantSpec, parse_budget

from .errors import UsageError
from .models import load_model
from .prompt import Prompt, build_prompt, check_length
from .run import Advance, Answer, Settings, answer_compressed, answer_full
from .tables import answer_table

WARMUP_TOKENS = 16  # one small forward pass first: the run that is timed first must not pay for thread pools


class Session:
    """Settings that have been checked, then a model, then answers."""

    def __init__(self, model_name: str, dtype: str, settings: Settings) -> None:
        self.model_name, self.dtype, self.settings = model_name, dtype, settings
        self.out = Console(highlight=False)
        self.err = Console(stderr=True)  # progress: stdout stays clean for the answer
        self.model: Any = None
        self.tokenizer: Any = None

    @classmethod
    def create(cls, model: str, dtype: str, *, budget: str, **settings: Any) -> Session:
        """Check what needs no model, so that a typing error costs no download. Raises UsageError."""
        value = None if budget.strip().lower() == "none" else budget
        chosen = Settings(budget=value, **settings)
        with usage_errors():
            parse_budget(value)
            get_policy(chosen.policy)
            QuantSpec.create(chosen.tiers, "gaussian", True)
        return cls(model, dtype, chosen)

    def load(self) -> None:
        """Load the model, and let the cache check the settings against it."""
        with self.err.status("starting") as status:
            self.model, self.tokenizer = load_model(self.model_name, self.dtype, status)
        with usage_errors():
            self.settings.new_cache(self.model.config)

    def answer(self, document: str, question: str, *, compare: bool, json_line: bool) -> dict[str, Any]:
        """Answer, show the tables, and return everything that --json prints."""
        prompt = build_prompt(self.tokenizer, document, question)
        context = getattr(self.model.config, "max_position_embeddings", None)
        check_length(prompt, self.settings.max_new_tokens, context)
        with torch.inference_mode():
            self.model(prompt.document[:, :WARMUP_TOKENS], use_cache=False)
        with usage_errors():
            small = self._run("SmartKV", prompt, compressed=True)
        full = self._run("full cache", prompt, compressed=False) if compare else None
        self.out.print(answer_table(small, full, torch.finfo(self.model.dtype).bits // 8))
        result: dict[str, Any] = {
            "model": self.model_name,
            "dtype": self.dtype,
            "kernel_set": ops.kernel_set_name(),
            "threads": torch.get_num_threads(),
            "document_tokens": prompt.document.shape[1],
            "question_tokens": prompt.question.shape[1],
            "settings": asdict(self.settings),
            "smartkv": small.to_dict(),
            "full": full.to_dict() if full else None,
            "same_answer": small.token_ids == full.token_ids if full else None,
        }
        if full:
            self.out.print("Answers: the same." if result["same_answer"] else "Answers: different.")
        if json_line:
            print(json.dumps(result), flush=True)
        return result

    def _run(self, label: str, prompt: Prompt, *, compressed: bool) -> Answer:
        """Prefill under a progress bar, then stream the answer to stdout."""
        count = prompt.document.shape[1]
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
            TimeRemainingColumn(), console=self.err, transient=True,
        )  # fmt: skip
        task = bar.add_task(f"{label}: reading the document", total=count)
        advance: Advance = lambda tokens: bar.advance(task, tokens)  # noqa: E731
        run = answer_compressed if compressed else answer_full
        started = False

        def emit(piece: str) -> None:
            nonlocal started
            if not started:  # the bar and the answer must not write to the terminal at the same time
                bar.stop()
                self.out.print(f"[bold]{label}:[/bold] ", end="")
                started = True
            sys.stdout.write(piece)
            sys.stdout.flush()

        with bar:
            answer = run(self.model, self.tokenizer, prompt, self.settings, advance, emit)
        sys.stdout.write("\n")
        return answer


@contextmanager
def usage_errors() -> Iterator[None]:
    """The library names the wrong argument in its ValueError: for the user that is the whole message."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
