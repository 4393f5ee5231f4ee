"""Gathers what the steps of bench/gpu_day.sh left in a folder: python -m bench.gpu_report build/gpu_day

Writes bench/results/<date>-<gpu>.json with every result whole, and a Markdown page with a row per measured case beside
it; needs no GPU. Refuses a folder whose steps did not see one: there would be nothing measured to report.
"""

from __future__ import annotations

import datetime
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.output import tier_label

RESULTS = Path(__file__).parent / "results"
FIELDS = ("us", "floor_us", "floor_ratio", "gbps", "copy_gbps", "gflops", "matmul_bf16_gflops")
VARIANTS = {"mass": "with mass", "ragged": "ragged", "mix": "ragged, all tiers"}


def last_json(path: Path) -> dict[str, Any] | None:
    """The last line that a benchmark printed; None where it printed no JSON."""
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return None
    return found


def test_counts(path: Path) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit file."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}


def gather(folder: Path) -> dict[str, Any]:
    """Every step in ``folder``: command, exit status (124: out of time), seconds and the JSON that it printed."""
    steps = {}
    for path in sorted(folder.glob("*.step")):
        status, seconds, command = path.read_text().rstrip("\n").split("\t", 2)
        steps[path.stem] = {"command": command, "status": int(status), "seconds": int(seconds)}
        result = last_json(path.with_suffix(".out"))
        if result is not None:  # also of a step that ran out of time and told what it had
            steps[path.stem]["result"] = result
    found: dict[str, Any] = {"steps": steps}
    if (folder / "tests.xml").is_file():
        found["tests"] = test_counts(folder / "tests.xml")
    return found


def _op_rows(name: str, result: dict[str, Any]) -> Iterator[list[str]]:
    """A row per tier and variant, with the fastest rival."""
    for case in result.get("cases", [result]):
        shared = {key: result[key] for key in ("copy_gbps",) if key in result} | case
        bits = case.get("bits", result["case"].get("bits"))
        label = f"{name}, {tier_label(bits)}" if bits else name
        best = f"{case['rivals_us'][case['best_torch']]:.4g} ({case['best_torch']})"
        yield [label, *(f"{shared[x]:.4g}" if x in shared else "" for x in FIELDS), best]
        for variant, words in VARIANTS.items():
            if f"{variant}_us" in case:
                ratio = f"x{case[f'{variant}_ratio']:.3g}"
                yield [f"{label}, {words}", f"{case[f'{variant}_us']:.4g}", "", ratio, *[""] * (len(FIELDS) - 2)]


def _generate_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for row in result["rows"]:
        figures = [row.get(x) for x in ("prefill_tokens_per_s", "decode_tokens_per_s", "held_bytes")]
        shown = [f"{x:,.4g}" if x is not None else "" for x in figures]
        yield [row["cache"], str(row["context"]), *shown, row.get("error", "")]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines), ""]


def markdown(machine: dict[str, Any], found: dict[str, Any]) -> str:
    """The machine; what failed; ops; generation; the commands."""
    steps = found["steps"]
    lines = [f"# {machine['gpu']}: torch {machine['torch']}, CUDA {machine['cuda']}, commit {machine['commit']}", ""]
    if "tests" in found:
        lines += [f"`pytest -m gpu`: {', '.join(f'{count} {name}' for name, count in found['tests'].items())}", ""]
    for name, step in steps.items():
        if name.startswith("sanitizer_"):
            outcome = {0: "clean", 7: "**errors**", 124: "out of time"}.get(step["status"], "**failed**")
            lines += [f"compute-sanitizer {name.removeprefix('sanitizer_')}: {outcome}", ""]
    failed = [f"{name} (exit status {step['status']})" for name, step in steps.items() if step["status"]]
    lines += [f"Failed: {', '.join(failed) or 'nothing'}", ""]
    measured = {name: step["result"] for name, step in steps.items() if "result" in step}
    rows = [row for name, x in measured.items() if "op" in x for row in _op_rows(name.removeprefix("bench_"), x)]
    lines += _table(["case", *FIELDS, "best rival us"], rows)
    if "generate" in measured:
        head = ["cache", "context", "prefill tok/s", "decode tok/s", "held bytes", "error"]
        lines += [measured["generate"]["title"], *_table(head, list(_generate_rows(measured["generate"])))]
    lines += [
        "Medians of CUDA graph replays over operands that rotate through more memory than the L2 holds. Commands:"
    ]
    return "\n".join([*lines, "", *(f"- {name}: `{step['command']}`" for name, step in steps.items()), ""])


def main(folder: Annotated[Path, typer.Argument(help="OUT of gpu_day.sh")]) -> None:
    """Write the JSON and the page; the last line names the page."""
    machine = last_json(folder / "machine.out")
    if machine is None or machine["gpu"] is None:
        raise SystemExit(f"{folder / 'machine.out'} names no GPU: nothing was measured")
    found = gather(folder)
    gpu = re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{datetime.date.today()}-{gpu}"
    stem.with_suffix(".json").write_text(json.dumps({"machine": machine} | found, indent=1, allow_nan=False) + "\n")
    stem.with_suffix(".md").write_text(markdown(machine, found))
    print(stem.with_suffix(".md"))


if __name__ == "__main__":
    typer.run(main)
