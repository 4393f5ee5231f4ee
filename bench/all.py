"""Every benchmark of an op, one process each, into one JSON file and one Markdown table.

python -m bench.all --device cpu
python -m bench.all --quick --out /tmp/results --only decode

The JSON file is written after every job: after Ctrl-C, --resume FILE runs what is missing.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from bench.machine import describe
from bench.tables import markdown
from smartkv_ext import ops
from smartkv_ext.reference import layout

RESULTS = Path(__file__).parent / "results"
TIERS = tuple(map(str, layout.TIERS))
SHAPES = {
    "": ("32", "8", "128"),  # query heads, kv heads, head_dim: Llama-3-8B, Qwen3-8B
    " SmolLM2-135M": ("9", "3", "64"),
    " Qwen2.5-1.5B": ("12", "2", "128"),
}
OPS: dict[str, list[list[str]]] = {  # module -> arguments of its cases
    "quantize_kv": [["--bits", bits] for bits in TIERS],
    "dequantize_kv": [["--bits", bits] for bits in TIERS],
    "append_kv": [["--new", "64"], ["--new", "8192", "--kv-len", "0"]],
    "compact_kv": [["--bits", bits] for bits in TIERS],
    "gate_score": [[]],
    "attention_mass": [[], ["--lse"]],
    "select_kv": [[]],
    "merge_states": [[]],
    "change_basis": [[], ["--tokens", "4096"]],
}
QUICK = {
    "append_kv": ["--new", "64", "--kv-len", "100"],
    "merge_states": ["--states", "4"],
    "gate_score": ["--kv-len", "256", "--hidden", "64"],
    "change_basis": ["--tokens", "16"],
}


@dataclass(frozen=True)
class Job:
    """One process."""

    name: str
    module: str
    arguments: tuple[str, ...]
    isa: str = ""  # SMARTKV_ISA; "": the best

    @property
    def key(self) -> str:
        """What is repeated is recognised by this."""
        return " ".join((self.isa, self.module, *self.arguments)).strip()

    def run(self, shared: list[str]) -> dict[str, Any]:
        """The last line of its output, or the last line of its error."""
        command = [sys.executable, "-m", f"bench.{self.module}", *self.arguments, *shared, "--json"]
        environment = os.environ | ({"SMARTKV_ISA": self.isa} if self.isa else {})
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        entry: dict[str, Any] = {
            "name": self.name, "key": self.key, "command": shlex.join(["python", *command[1:]]), "isa": self.isa,
        }  # fmt: skip
        if done.returncode == 0:
            return entry | {"result": json.loads(done.stdout.splitlines()[-1])}
        return entry | {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def decode_arguments(shape: str, kv_len: int, *more: str) -> tuple[str, ...]:
    """Arguments of bench.decode_attention for all tiers."""
    heads, kv_heads, head_dim = SHAPES[shape]
    tiers = [part for bits in TIERS for part in ("--bits", bits)]
    sizes = ["--kv-len", str(kv_len), "--heads", heads, "--kv-heads", kv_heads, "--head-dim", head_dim]
    return (*tiers, *sizes, *more)


def jobs(device: str) -> Iterator[Job]:
    """Everything. Kernel sets other than the best are a matter of the CPU."""
    for kv_len in (4096, 32768):
        arguments = decode_arguments("", kv_len, "--mix", "--mass", "--error")
        yield Job(f"decode {kv_len // 1024}k", "decode_attention", arguments)
    for shape in list(SHAPES)[1:]:
        yield Job(f"decode 8k{shape}", "decode_attention", decode_arguments(shape, 8192, "--mix", "--mass", "--error"))
    yield Job("decode 32k, 2 MB pages", "decode_attention", decode_arguments("", 32768, "--huge-pages"))
    yield Job("decode 8k, window 128", "decode_attention", decode_arguments("", 8192, "--window", "128", "--mass"))
    yield Job("decode 8k, 4 queries", "decode_attention", decode_arguments("", 8192, "--q-len", "4"))
    yield Job("decode 8k, batch 4", "decode_attention", decode_arguments("", 8192, "--batch", "4"))
    for module, cases in OPS.items():
        for arguments in cases:
            yield Job(" ".join([module, *arguments]), module, tuple(arguments))
    for isa in ops.available_kernel_sets()[1:] if device == "cpu" else ():
        for kv_len in (4096, 32768):
            arguments = decode_arguments("", kv_len, "--error")
            yield Job(f"decode {kv_len // 1024}k, {isa}", "decode_attention", arguments, isa)
        for module, cases in OPS.items():
            yield Job(" ".join([module, *cases[-1]]) + f", {isa}", module, tuple(cases[-1]), isa)


def quick_jobs() -> Iterator[Job]:
    """Every module once, at sizes that take no time: to see that all of them work."""
    sizes = ("--kv-len", "300", "--heads", "4", "--kv-heads", "2", "--head-dim", "64")
    yield Job("decode", "decode_attention", ("--bits", "2", "--bits", "4", *sizes, "--mix", "--mass", "--error"))
    for module in OPS:
        yield Job(module, module, tuple(QUICK.get(module, ["--kv-len", "300"])))


def new_stem(folder: Path, device: str) -> Path:
    """folder/<date>-<device>, numbered where such files exist already."""
    name = f"{datetime.date.today().isoformat()}-{device}"
    stems = (name, *(f"{name}-{i}" for i in range(2, 1000)))
    return next(folder / s for s in stems if not any((folder / f"{s}{end}").exists() for end in (".json", ".md")))


def main(
    device: str = "cpu",
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="time spent on each measurement")] = 1.0,
    only: Annotated[str, typer.Option(help="run the jobs whose name holds this")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="every module once, tiny: no figures worth keeping")] = False,
    out: Annotated[Path, typer.Option(help="folder for the results")] = RESULTS,
    resume: Annotated[Path | None, typer.Option(help="JSON file of an interrupted run, to complete")] = None,
) -> None:
    """Run the jobs; the last line names the JSON file. Jobs that fail are recorded with their error; exit status 1."""
    todo = [job for job in (quick_jobs() if quick else jobs(device)) if only in job.name]
    if not todo:
        raise typer.BadParameter(f"no job's name holds {only!r}", param_hint="--only")
    out.mkdir(parents=True, exist_ok=True)
    path = resume or new_stem(out, device).with_suffix(".json")
    if resume:
        record = json.loads(resume.read_text())
    else:
        command = shlex.join(["python", "-m", "bench.all", *sys.argv[1:]])
        record = {
            "date": datetime.date.today().isoformat(),
            "command": command,
            "machine": describe(device),
            "jobs": [],
        }
    finished = {entry["key"] for entry in record["jobs"] if "result" in entry}
    shared = ["--device", device, "--threads", str(threads), "--seconds", str(0.02 if quick else seconds)]
    with tqdm(todo, unit="job") as progress:
        for job in progress:
            progress.set_description(job.name)
            if job.key in finished:
                continue
            record["jobs"] = [entry for entry in record["jobs"] if entry["key"] != job.key] + [job.run(shared)]
            path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    failed = [entry for entry in record["jobs"] if "error" in entry]
    for entry in failed:
        print(f"{entry['name']}: {entry['error']}", file=sys.stderr)
    print(path)
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
