"""`smartkv doctor`: what is installed, what was built, what runs here."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import smartkv_ext

from .errors import CliError

OPS = (
    "quantize_kv", "dequantize_kv", "append_kv", "decode_attention", "attention_mass", "select_kv", "compact_kv",
    "merge_states", "gate_score",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Facts for a bug report. Raises CliError if the compiled modules cannot be loaded."""
    try:
        from smartkv_ext import ops

        build = ops.build_info()
        kernel_set, kernel_sets = ops.kernel_set_name(), ops.available_kernel_sets()
    except (ImportError, RuntimeError) as error:
        raise CliError(str(error)) from error
    return {
        "smartkv_ext": smartkv_ext.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compiler": f"{build['compiler']} {build['cxx_flags']}",
        "kernel_set": kernel_set,
        "available_kernel_sets": kernel_sets,
        "cpu_features": build["cpu_features"],
        "threads": torch.get_num_threads(),
        "ops": [name for name in OPS if hasattr(torch.ops.smartkv, name)],
        "missing_ops": [name for name in OPS if not hasattr(torch.ops.smartkv, name)],
        "cuda_built": build["cuda"],
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def run_doctor(json_line: bool) -> None:
    """Print the facts; raise CliError if an op is missing."""
    facts = collect()
    table = Table(show_header=False)
    for name, value in facts.items():
        text = (", ".join(value) or "none") if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console(highlight=False).print(table)
    if json_line:
        print(json.dumps(facts), flush=True)
    if facts["missing_ops"]:
        raise CliError(f"ops are missing: {', '.join(facts['missing_ops'])}; build the extension again")
