"""What goes wrong is said in one sentence; exit code 2: an argument cannot be right, 1: it could not be done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # what shells report for a process that SIGINT ended


class CliError(Exception):
    """Shown to the user as it is, without a traceback."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class UsageError(CliError):
    """An argument that cannot be right: exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 2)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type: library errors may go on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn errors and Ctrl-C into one line on stderr and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        try:
            return function(*args, **kwargs)
        except CliError as error:
            console.print(f"Error: {error}", markup=False)
            raise typer.Exit(error.code) from None
        except KeyboardInterrupt as error:
            console.print(" ".join(["Interrupted.", *map(str, error.args)]), markup=False)
            raise typer.Exit(INTERRUPTED) from None

    return wrapped
