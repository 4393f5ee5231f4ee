"""`smartkv doctor`: what is installed, what was built, what runs here. Works where the extension does not."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from .errors import first_line
from .models import EMBEDDED, cache_dir
from .smollm2 import FOLDER

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "gguf")  # of interest in a bug report
OPS = (
    "quantize_kv", "dequantize_kv", "append_kv", "decode_attention", "attention_mass", "select_kv", "compact_kv",
    "merge_states", "gate_score", "change_basis",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Facts for a bug report; ``problems`` is empty where everything works."""
    import torch

    import smartkv_ext

    problems: list[str] = []
    facts: dict[str, Any] = {
        "smartkv_ext": smartkv_ext.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    facts |= {name: _version(name) for name in PACKAGES}
    found = facts | _core_facts(problems) | _op_facts(problems)
    if not problems:
        found |= _model_facts(problems)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return found | {
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        "embedded_model": EMBEDDED if (cache_dir() / FOLDER / "config.json").is_file() else None,
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _core_facts(problems: list[str]) -> dict[str, Any]:
    names = ("compiler", "cxx_flags", "cuda_built", "cpu_features", "available_kernel_sets", "kernel_set")
    facts: dict[str, Any] = dict.fromkeys(names)
    try:
        core = importlib.import_module("smartkv_ext._core")
        built = core.build_info()
        facts |= {"compiler": built["compiler"], "cxx_flags": built["cxx_flags"], "cuda_built": built["cuda"]}
        facts["cpu_features"] = list(core.cpu_features())
        facts["available_kernel_sets"] = list(core.available_kernel_sets())
        facts["kernel_set"] = str(core.kernel_set_name())  # last: an unknown SMARTKV_ISA raises
    except (ImportError, RuntimeError) as error:
        problems.append(first_line(error))
    return facts


def _op_facts(problems: list[str]) -> dict[str, Any]:
    import torch

    try:
        importlib.import_module("smartkv_ext.ops")
    except (ImportError, RuntimeError, AttributeError) as error:
        problems.append(first_line(error))
    built = [name for name in OPS if hasattr(torch.ops.smartkv, name)]
    missing = [name for name in OPS if name not in built]
    if missing and built:
        problems.append(f"ops are missing: {', '.join(missing)}; build the extension again")
    return {"ops": built, "missing_ops": missing}


def _model_facts(problems: list[str]) -> dict[str, Any]:
    """Whether a tiny model of every supported type runs right with a SmartKVCache under the installed transformers."""
    try:
        from smartkv_ext.hf.compat import NEWEST, OLDEST
        from smartkv_ext.hf.patching import SUPPORTED
        from smartkv_ext.hf.self_test import self_test
    except ImportError as error:  # a transformers that lacks what the package imports
        problems.append(first_line(error))
        return {"model_types": []}
    failed = self_test()
    problems.extend(failed)
    working = [name for name in SUPPORTED if not any(text.startswith(f"{name}:") for text in failed)]
    return {"transformers_tried": f"{OLDEST} to {NEWEST}", "model_types": working}


def facts_table(facts: dict[str, Any]) -> Table:
    """The facts for reading."""
    table = Table(show_header=False)
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        table.add_row(name.replace("_", " "), "none" if text in (None, "") else str(text))
    return table
