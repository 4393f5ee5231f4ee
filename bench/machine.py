"""What a result was measured on. python -m bench.machine: as JSON, of the GPU where there is one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from smartkv_ext import ops


def describe(device: str) -> dict[str, Any]:
    """Hardware, versions, kernel sets and commit."""
    built = ops.build_info()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "smartkv_ext": built["version"],
        "compiler": built["compiler"],
        "kernel_sets": ops.available_kernel_sets(),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        parts = [named.get("model name", ""), *(f"{x} {named[x]}" for x in ("cpu family", "model") if x in named)]
        return ", ".join(part for part in parts if part)
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the working tree, with + behind it where files have changed; None outside a repository."""
    root = Path(__file__).parents[1]
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    return out.stdout.strip() or None


if __name__ == "__main__":
    print(json.dumps(describe("cuda" if torch.cuda.is_available() else "cpu")))
