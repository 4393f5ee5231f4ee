"""The Markdown table of a run of bench.all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.output import tier_label
from bench.timing import CALM

COLUMNS = ("case", "kernels", "us", "GB/s", "read GB/s", "x floor", "best torch us", "x best torch", "more")
EXTRAS = {  # field -> how it is written
    "input_gbps": "input {:.1f} GB/s",
    "output_gbps": "output {:.1f} GB/s",
    "gflops": "{:.0f} GFLOP/s",
    "matmul_bf16_gflops": "bf16 matmul {:.0f}",
    "matmul_fp32_gflops": "fp32 matmul {:.0f}",
    "mass_ratio": "with mass x{:.2f}",
    "ragged_ratio": "ragged x{:.2f}",
    "mix_ratio": "ragged and mixed x{:.2f}",
    "error": "error {:.1e}",
    "error_torch_bf16": "torch bf16's {:.1e}",
}

LEGEND = """\
Medians on cold operands. GB/s: bytes that must be read and written once, over the time; read GB/s: torch's fastest
read of cold memory; x floor: the time over that of reading as many bytes; best torch: the fastest of the rivals. Read,
best rival and op took turns. `bench/` says for each op what its bytes and its rivals are; the JSON file beside this one
holds all rivals. With mass, ragged, mixed: time over that of the uniform cache without mass, per byte; ragged heads
differ in length up to 7 times, mixed ones spread their bytes evenly over all tiers. Errors: relative L2 against float64
over the dequantised cache, diffuse random attention.
"""


def markdown(record: dict[str, Any]) -> str:
    """Title, machine, and one row per case."""
    machine = {name: value for name, value in record["machine"].items() if value is not None}
    facts = "\n".join(f"- {name}: {_plain(value)}" for name, value in machine.items())
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for entry in record["jobs"]:
        lines += [f"| {' | '.join(row)} |" for row in _rows(entry)]
    table = "\n".join(lines)
    return f"# {record['date']}: `{record['command']}`\n\n{facts}\n\n{LEGEND}\n{table}\n"


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _rows(entry: dict[str, Any]) -> Iterator[list[str]]:
    if "error" in entry:
        yield [entry["name"], entry["isa"], *["-"] * 6, "failed: " + entry["error"].replace("|", "\\|")]
        return
    result = entry["result"]
    for case in result.get("cases", [result]):
        name = f"{entry['name']}, {tier_label(case['bits'])}" if "bits" in case else entry["name"]
        more = [text.format(case[field]) for field, text in EXTRAS.items() if field in case]
        if case["others_cpu"] > CALM:
            more.append(f"**busy machine: others took {case['others_cpu']:.0%} of the CPU**")
        best = case["rivals_us"][case["best_torch"]]
        yield [
            name, result["kernel_set"], f"{case['us']:,.0f}", f"{case['gbps']:.1f}", f"{case['bandwidth_gbps']:.1f}",
            f"{case['floor_ratio']:.2f}", f"{best:,.0f} ({case['best_torch']})",
            f"{case['speedup_vs_best_torch']:.2f}", "; ".join(more),
        ]  # fmt: skip
