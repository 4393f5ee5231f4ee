"""One run of `generate` or `demo`: load, check, answer, show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from smartkv_ext import ops
from smartkv_ext.cache.config import SCOPES
from smartkv_ext.eval.prompt import Prompt
from smartkv_ext.policies import get_policy
from smartkv_ext.quant import QuantSpec, parse_budget

from .errors import CliError, UsageError, first_line
from .models import check_dtype, check_source, load_model
from .prompt import build_prompt, check_length
from .run import Answer, Settings, answer_compressed, answer_full
from .tables import answer_table

WARMUP_TOKENS = 16  # one small forward pass first: the run that is timed first must not pay for thread pools


class Session:
    """Settings that have been checked, then a model, then answers."""

    def __init__(self, model_name: str, dtype: str, settings: Settings, as_json: bool = False) -> None:
        self.model_name, self.dtype, self.settings = model_name, dtype, settings
        self.as_json = as_json  # then stdout is for the JSON alone, and what people read goes to stderr
        self.out = Console(highlight=False, stderr=as_json)
        self.err = Console(stderr=True)  # progress: stdout stays clean for the answer
        self.model: Any = None
        self.tokenizer: Any = None

    @classmethod
    def create(cls, model: str, dtype: str, *, budget: str, as_json: bool, **settings: Any) -> Session:
        """Check what needs no model, so that a typing error costs no download. Raises UsageError."""
        value = None if budget.strip().lower() == "none" else budget
        chosen = Settings(budget=value, **settings)
        with usage_errors():
            parse_budget(value)
            get_policy(chosen.policy)
            if chosen.tiers is not None:
                QuantSpec.create(chosen.tiers, "gaussian", True)
            if chosen.scope not in SCOPES:
                raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {chosen.scope!r}")
        check_dtype(dtype)
        check_source(model)
        return cls(model, dtype, chosen, as_json)

    def load(self) -> None:
        """Load the model, and let the cache check the settings against it."""
        with self.err.status("starting") as status:
            self.model, self.tokenizer = load_model(self.model_name, self.dtype, status)
        with usage_errors():
            self.settings.new_cache(self.model.config)

    def answer(self, document: str, question: str, *, compare: bool) -> dict[str, Any]:
        """Show the answers and the table, and return everything that --json prints."""
        prompt = build_prompt(self.tokenizer, document, question)
        context = getattr(self.model.config, "max_position_embeddings", None)
        check_length(prompt, self.settings.max_new_tokens, context)
        with failures():
            with torch.inference_mode():
                self.model(prompt.document[:, :WARMUP_TOKENS], use_cache=False)
            small = self._run("SmartKV", answer_compressed, prompt)
            full = self._run("full cache", answer_full, prompt) if compare else None
        dtype = str(self.model.dtype).removeprefix("torch.")
        result: dict[str, Any] = {
            "model": self.model_name,
            "dtype": dtype,
            "kernel_set": ops.kernel_set_name(),
            "threads": torch.get_num_threads(),
            "document_tokens": prompt.document.shape[1],
            "question_tokens": prompt.question.shape[1],
            "question": question,
            "settings": asdict(self.settings),
            "smartkv": small.to_dict(),
            "full": full.to_dict() if full else None,
            "same_answer": small.token_ids == full.token_ids if full else None,
        }
        self.out.print(answer_table(small, full, dtype))
        if full:
            self.out.print(f"Answers: {'the same' if result['same_answer'] else 'different'}.")
        return result

    def _run(self, label: str, run: Callable[..., Answer], prompt: Prompt) -> Answer:
        """Prefill under a progress bar on stderr, then stream the answer."""
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=self.err, transient=True,
        )  # fmt: skip
        task = bar.add_task(f"{label}: reading the document", total=prompt.document.shape[1])
        started = False

        def emit(piece: str) -> None:
            nonlocal started
            if not started:  # the bar and the answer must not write to the terminal at the same time
                bar.stop()
                self.out.print(f"[bold]{label}:[/bold] ", end="")
                started = True
            self.out.file.write(piece)  # as it is: rich would wrap lines and read brackets
            self.out.file.flush()

        with bar:
            try:
                return run(
                    self.model, self.tokenizer, prompt, self.settings, lambda tokens: bar.advance(task, tokens),
                    emit,
                )  # fmt: skip
            finally:
                if started:
                    self.out.print()


@contextmanager
def failures() -> Iterator[None]:
    """A budget that a policy cannot meet, a chunk that memory cannot hold: one sentence, no traceback."""
    try:
        with usage_errors():
            yield
    except (NotImplementedError, RuntimeError, MemoryError) as error:
        raise CliError(f"the model could not answer: {first_line(error)}") from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """The library names the wrong argument in its ValueError: for the user that is the whole message."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
