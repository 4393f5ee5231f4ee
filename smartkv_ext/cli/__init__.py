"""The command ``smartkv``: generate, demo, doctor, policies; explore, collect, train, evaluate, export."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of ``smartkv`` and of ``python -m smartkv_ext``. Ends the process."""
    try:
        from . import training  # noqa: F401  # its commands
        from .app import app

        app()
    except KeyboardInterrupt:  # while importing: inside a command the command's own handler comes first
        sys.exit(130)
