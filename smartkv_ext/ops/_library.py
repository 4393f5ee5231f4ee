"""Loads the compiled ops: importing ``smartkv_ext._C`` registers them as ``torch.ops.smartkv.*``."""

from __future__ import annotations

import importlib

import torch  # noqa: F401  (its shared libraries must be loaded before _C)

BUILD_COMMAND = "pip install --no-build-isolation -e ."


def load() -> None:
    """Import ``_C``, or say how to build it."""
    try:
        importlib.import_module("smartkv_ext._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled ops of smartkv_ext could not be loaded ({error}); "
            f"build them in the repository root with: {BUILD_COMMAND}"
        ) from error


load()
