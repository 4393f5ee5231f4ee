"""Quality at true bytes: the methods, budgets and tasks behind the tables of docs/design/quality.md.

python -m bench.quality --model FOLDER --out rows.jsonl --set budgets --text NOVEL.txt@0.5 --length 4096
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smartkv_ext.cli.evaluate import run

BUDGETS = ["0.5", "0.25", "0.125", "0.0625", "0.03125"]
POLICIES = [
    "keydiff", "snapkv", "pyramidkv", "tova", "expected_attention", "h2o", "hybrid", "layer_aware", "evolved", "knorm",
    "streaming_llm", "random",
]  # fmt: skip
RIVALS = [
    "full", "quanto bits=4", "quanto bits=2", "hqq bits=8", "hqq bits=4", "hqq bits=2", "kivi bits=4", "kivi bits=3",
    "kivi bits=2", "tokenwise bits=4", "tokenwise bits=2",
]  # fmt: skip
UNIFORM = [f"uniform bits={bits}" for bits in (8, 4, 3, 2)]
BEST = ["expected_attention", "snapkv", "keydiff", "evolved"]  # for ablations: one policy of each kind

SETS: dict[str, list[str]] = {
    "none": [],
    "rivals": RIVALS + UNIFORM,
    "budgets": [f"smartkv policy={policy}" for policy in POLICIES if policy != "map"],
    "evict_only": [f"smartkv policy={policy} tiers=16" for policy in BEST],
    "equal_bits": [f"smartkv policy={policy} tiers=2,3,4,8,16" for policy in BEST],
    "four_bits": [f"smartkv policy={policy} tiers=4" for policy in BEST],
    "floor": [f"smartkv policy={policy} tiers=K3V2" for policy in BEST],
    "presses": [f"kvpress press={x}Press" for x in ("SnapKV", "KeyDiff", "ExpectedAttention", "TOVA", "StreamingLLM")],
}


def main(
    out: Annotated[Path, typer.Option(help="JSONL file")],
    model: str = "smollm2",
    dtype: str = "bfloat16",
    chosen: Annotated[list[str], typer.Option("--set", help=", ".join(SETS))] = ["rivals", "budgets"],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="further methods")] = [],  # noqa: B006
    budget: list[str] = BUDGETS,
    task: list[str] = ["text", "recall"],  # noqa: B006
    text: Annotated[list[str], typer.Option(help="FILE or FILE@0.5")] = [],  # noqa: B006
    data: Path | None = None,
    length: list[int] = [2048],  # noqa: B006
    samples: int = 1,
    subtask: list[str] = [],  # noqa: B006
    query_aware: bool = False,
    maps: bool = False,
    recordings: Annotated[
        Path | None, typer.Option(help="folder for prefills: a continued run needs no new ones")
    ] = None,
) -> None:
    """Write rows; a run that was stopped continues."""
    specs = [spec for name in chosen for spec in SETS[name]] + method
    options = {"data": data, "texts": tuple(text), "lengths": tuple(length), "samples": samples}
    options["subtasks"] = tuple(subtask)
    run(
        model,
        dtype,
        out,
        task,
        specs,
        budget,
        options,
        {"query_aware": query_aware, "maps": maps, "recordings": recordings},
    )


if __name__ == "__main__":
    typer.run(main)
