"""Registers, shared memory and spills of the CUDA kernels, from what ptxas said when the extension was built.

python csrc/tests/check_spills.py [FOLDER OF THE BUILD]

Prints a row per kernel and fails where one spills registers that is not in ALLOWED. Without nvcc there is nothing to
read: it says so and succeeds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build"
ALLOWED = {
    # kernel: (bytes of spill stores, why they matter little)
    "demote_kernel<256, 2>": (144, "decoders and an encoder of sixteen values in each lane; runs when packing"),
    "demote_kernel<256, 302>": (64, "the same"),
    "demote_kernel<256, 3>": (12, "the same"),
    "quantize_kv_kernel<80, 2>": (
        28,
        "the shift of a key beside its rotation; one block instead of two would cost more",
    ),
    "quantize_kv_kernel<80, 302>": (16, "the same"),
    "quantize_kv_kernel<80, 3>": (28, "the same"),
    "quantize_kv_kernel<80, 403>": (16, "the same"),
    "quantize_kv_kernel<80, 4>": (28, "the same"),
    "quantize_kv_kernel<80, 8>": (16, "the same"),
    "quantize_kv_kernel<256, 403>": (16, "the same, on sm_80 alone"),
    "quantize_kv_kernel<256, 4>": (16, "the same, on sm_80 alone"),
    "decode_attention_kernel<80, 1, true>": (32, "float32, the three terms of every operand: not what GPUs serve"),
    "decode_attention_kernel<96, 1, true>": (32, "the same"),
    "decode_attention_kernel<96, 2, false>": (24, "seven kinds of tiles in one kernel; few registers, sm_90 alone"),
    "decode_attention_kernel<80, 1, false>": (8, "the same"),
}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One instance for one architecture; bytes, of a thread or (shared memory, without the dynamic) of a block."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    stores: int
    loads: int


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters."""
    out = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\(anonymous namespace\)::|smartkv::", "", line) for line in out.splitlines()]


def kernels(log: str) -> list[Kernel]:
    """Those of the output of `nvcc -Xptxas -v`."""
    parts = ENTRY.split(log)[1:]
    names = readable(parts[::3]) if parts else []
    found = []
    for name, architecture, text in zip(names, parts[1::3], parts[2::3], strict=True):
        stack, used, shared = STACK.search(text), USED.search(text), SHARED.search(text)
        if stack is None or used is None:
            raise SystemExit(f"no register count of {name} for {architecture}: has the output of ptxas changed?")
        sizes = (int(x) for x in stack.groups())
        found.append(Kernel(name, architecture, int(used[1]), int(shared[1]) if shared else 0, *sizes))
    return found


def main(build: Path = BUILD) -> None:
    """Exit status 1 where a kernel spills."""
    logs = sorted(build.rglob("*.cu.o.log"))
    if not logs:
        print(f"check_spills: skipped, no CUDA kernel was built under {build} (no nvcc?)")
        return
    found = sorted((k for log in logs for k in kernels(log.read_text())), key=lambda k: (k.name, k.architecture))
    print(f"{'kernel':54}{'':8}{'registers':>10}{'shared':>8}{'stack':>7}{'spilled':>9}")
    for k in found:
        print(f"{k.name:54}{k.architecture:8}{k.registers:10}{k.shared:8}{k.stack:7}{k.stores:9}")
    bad = [k for k in found if k.stores > ALLOWED.get(k.name, (0, ""))[0]]
    for k in bad:
        print(f"{k.name} for {k.architecture} spills {k.stores} bytes of registers", file=sys.stderr)
    print(f"check_spills: {len(found)} kernels, {len(bad)} spill more than they may")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
