"""`smartkv eval`: arguments in, rows out. The work is in smartkv_ext.eval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from smartkv_ext.cache import SmartKVCache
from smartkv_ext.eval.methods import Method, get_method, smartkv_arguments
from smartkv_ext.eval.runner import Results, Settings, evaluate
from smartkv_ext.eval.tasks import TASKS, TaskOptions, get_documents

from .errors import CliError, UsageError, first_line
from .models import check_dtype, check_source, load_model
from .session import usage_errors


def expand(specs: list[str], budgets: list[str]) -> list[Method]:
    """Every method, at every budget if it takes one and its spec names none."""
    methods: list[Method] = []
    for spec in specs:
        method = get_method(spec)
        methods += [method.with_budget(b) for b in budgets] if method.takes_budget and budgets else [method]
    return list({method.spec: method for method in methods}.values())


def report(rows: list[Path], out: Path) -> None:
    """Write the report of ``rows``. Raises UsageError and CliError."""
    missing = [path for path in rows if not path.is_file()]
    if missing:
        raise UsageError(f"file {str(missing[0])!r} does not exist")
    try:
        from smartkv_ext.eval.report import write_report

        with usage_errors():
            write_report(rows, out)
    except ImportError as error:
        raise CliError(
            f'the report needs matplotlib and jinja2: pip install "smartkv-ext[report]" ({error})'
        ) from error


def run(
    model_name: str,
    dtype: str,
    out: Path,
    tasks: list[str],
    specs: list[str],
    budgets: list[str],
    options: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Check everything that needs no model, then measure what ``out`` lacks. Raises UsageError and CliError."""
    with usage_errors():
        unknown = [task for task in tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {unknown[0]!r}")
        methods = expand(specs, budgets)
        results = Results(out)
    check_dtype(dtype)
    check_source(model_name)
    if not out.parent.is_dir():
        raise UsageError(f"folder {str(out.parent)!r} does not exist")
    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:
        model, tokenizer = load_model(model_name, dtype, status)
    with usage_errors():
        for method in methods:
            if method.kind == "smartkv":
                SmartKVCache(model.config, **smartkv_arguments(method.options))
        documents = get_documents(tasks, replace(TaskOptions(tokenizer), **options))
        chosen = Settings(Path(model_name).name, str(model.dtype).removeprefix("torch."), **settings)

        def say(text: str) -> None:
            console.print(text, markup=False)

        try:
            with torch.no_grad():
                evaluate(model, tokenizer, documents, methods, results, chosen, say)
        except (RuntimeError, NotImplementedError, MemoryError) as error:
            raise CliError(f"the model could not be evaluated: {first_line(error)}") from error
