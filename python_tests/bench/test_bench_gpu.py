"""What measures on a GPU, as far as a machine without one can tell: the arithmetic around graphs and events, the parts
of the script, and the page that is made of what its steps leave."""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import typer

import bench.gpu_report as gpu_report
from bench import cuda_graphs
from bench.timing import Work

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_day.sh"


@pytest.fixture
def gpu(monkeypatch):
    """A device on which everything between two events takes 6 ms, and 100 ms what it does for the first time. Captured
    calls run when their graph is replayed."""

    class Graph:
        def __init__(self):
            self.calls = []

        def replay(self):
            for call in self.calls:
                call()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.loaded = len(loaded)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 6.0 if end.loaded == self.loaded else 100.0

    capturing = []
    loaded = set()

    @contextlib.contextmanager
    def capture(graph):
        capturing.append(graph)
        yield
        capturing.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)

    def recorded(call):
        def launch():
            if capturing:
                return capturing[-1].calls.append(call)
            loaded.add(call)
            return call()

        return launch

    return recorded


def test_several_calls_share_a_graph(gpu):
    ran = []
    work = Work([gpu(lambda i=i: ran.append(i)) for i in range(8)])
    recording = cuda_graphs.Recording(work)
    assert recording.is_captured
    ran.clear()
    spent = [recording.once(turn) for turn in range(3)]
    assert ran == list(range(8)) and spent == pytest.approx([0.006 / 3, 0.006 / 3, 0.006 / 2])


def test_what_must_be_restored_is_measured_alone(gpu):
    log = []
    calls = [gpu(lambda i=i: log.append(f"call {i}")) for i in range(3)]
    recording = cuda_graphs.Recording(Work(calls, restore=lambda i: log.append(f"restore {i}")))
    log.clear()
    assert recording.once(4) == pytest.approx(0.006)
    assert log == ["call 1", "restore 1"]


def test_calls_that_cannot_be_captured_are_launched(gpu, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    ran = []
    recording = cuda_graphs.Recording(Work([lambda: ran.append(0)]))
    assert not recording.is_captured
    assert recording.once(0) == pytest.approx(0.006) and len(ran) == 4


def test_works_take_turns(gpu):
    ran = []
    works = [Work([gpu(lambda i=i: ran.append(i))]) for i in range(2)]
    found = cuda_graphs.samples(works, 0.0)
    assert [len(x) for x in found] == [cuda_graphs.LEAST] * 2
    assert ran[-4:] == [0, 1, 0, 1]


def write_step(folder, name, status, out):
    (folder / f"{name}.step").write_text(f"{status}\t12\tpython -m something --json\n")
    (folder / f"{name}.out").write_text(out)


def test_page_of_made_results(tmp_path):
    case = {
        "bits": 4, "us": 21.5, "floor_us": 8.3, "floor_ratio": 2.59, "gbps": 1660.0, "rivals_us": {"flash": 43.0},
        "best_torch": "flash", "mix_us": 23.0, "mix_ratio": 1.07,
    }  # fmt: skip
    result = {"op": "decode_attention", "case": {"kv_len": 32768}, "copy_gbps": 4300.0, "cases": [case]}
    write_step(tmp_path, "bench_decode_1x32k", 0, f"noise\n{json.dumps(result)}\n")
    write_step(tmp_path, "bench_merge", 124, "")
    write_step(tmp_path, "sanitizer_memcheck", 0, "1 passed")
    write_step(tmp_path, "sanitizer_racecheck", 7, "1 passed")
    rows = [
        {"cache": "SmartKV 0.125", "context": 8192, "decode_tokens_per_s": 50.0},
        {"cache": "x", "context": 1, "error": "a|b"},
    ]
    write_step(tmp_path, "generate", 0, json.dumps({"title": "random bfloat16", "rows": rows}))
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="50" failures="1" errors="0" skipped="2"></testsuite></testsuites>'
    )
    found = gpu_report.gather(tmp_path)
    assert found["tests"] == {"tests": 50, "failures": 1, "errors": 0, "skipped": 2}
    assert found["steps"]["bench_merge"] == {"command": "python -m something --json", "status": 124, "seconds": 12}
    page = gpu_report.markdown({"gpu": "H200", "torch": "2.11", "cuda": "13.0", "commit": "abc"}, found)
    for line in (
        "| decode_1x32k, 4 bit | 21.5 | 8.3 | 2.59 | 1660 | 4300 |  |  | 43 (flash) |",
        "| decode_1x32k, 4 bit, ragged, all tiers | 23 |  | x1.07 |  |  |  |  |  |",
        "| SmartKV 0.125 | 8192 |  | 50 |  |  |",
        "compute-sanitizer racecheck: **errors**",
        "Failed: bench_merge (exit status 124), sanitizer_racecheck (exit status 7)",
        "50 tests, 1 failures, 0 errors, 2 skipped",
    ):
        assert line in page.splitlines() or line in page, line
    widths = {
        line.count(" | ") for line in page.splitlines() if line.startswith("| decode") or line.startswith("| case")
    }
    assert len(widths) == 1


def test_nothing_is_reported_without_a_gpu(tmp_path):
    for machine in ("", json.dumps({"gpu": None})):
        (tmp_path / "machine.out").write_text(machine)
        with pytest.raises(SystemExit, match="names no GPU"):
            gpu_report.main(tmp_path)


def test_report_of_a_bundle(tmp_path, monkeypatch):
    """On another machine, of steps that ran out of time before theirs could be written."""
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "results")
    (tmp_path / "machine.out").write_text(json.dumps({"gpu": "X 1", "torch": "2", "cuda": "13", "commit": "a"}))
    write_step(tmp_path, "generate", 124, json.dumps({"title": "part of it", "rows": [{"cache": "c", "context": 1}]}))
    gpu_report.main(tmp_path)
    (page,) = (tmp_path / "results").glob("*-x-1.md")
    assert "part of it" in page.read_text() and "generate (exit status 124)" in page.read_text()


def test_script_knows_its_parts():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = subprocess.run([SCRIPT, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "build tests bench generate sanitizer" in done.stderr


def commands(tmp_path, *parts):
    """What steps would run, as lists of arguments of the interpreter."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >> {log}; echo >> {log}\n')
    python.chmod(0o755)
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\nwhile [ "${1%/python}" = "$1" ]; do shift; done; exec "$@"\n')
    sanitizer.chmod(0o755)
    environment = os.environ | {
        "PYTHON": str(python), "FOLDER": str(tmp_path / "out"), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    subprocess.run([SCRIPT, *parts], check=True, capture_output=True, env=environment)
    return [line.split("\t")[:-1] for line in log.read_text().splitlines()]


def test_script_gives_benchmarks_options_that_they_have(tmp_path):
    called = [line for line in commands(tmp_path, "bench", "generate") if line[1].startswith("bench.")]
    assert len(called) == 14 and called[-1] == ["-m", "bench.gpu_report", str(tmp_path / "out")]
    for _, module, *arguments in called:
        app = typer.Typer()
        app.command()(importlib.import_module(module).main)
        typer.main.get_command(app).make_context(module, arguments)


@pytest.mark.parametrize("part, least", [("tests", 60), ("sanitizer", 6)])
def test_script_selects_gpu_tests(part, least, tmp_path):
    """As many as there are, none of which fails to be collected."""
    for _, module, *arguments in [line for line in commands(tmp_path, part) if line[1] == "pytest"]:
        assert module == "pytest"
        command = [sys.executable, "-m", module, *arguments, "--collect-only"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1])
        found = re.search(r"^(\d+)/\d+ tests collected|^(\d+) tests collected", done.stdout, re.M)
        assert done.returncode == 0 and found, done.stdout
        assert int(found[1] or found[2]) >= least, done.stdout
        if part == "sanitizer":  # all three run the same
            break


def test_script_goes_on_after_a_failure(tmp_path):
    """With an interpreter that prints JSON, and fails where select_kv is to be measured."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *select_kv*) echo broken >&2; exit 3;; *) echo \'{"a": 1}\';; esac\n')
    python.chmod(0o755)
    bundle = tmp_path / "all.tar.gz"
    environment = os.environ | {"PYTHON": str(python), "FOLDER": str(tmp_path / "out"), "BUNDLE": str(bundle)}
    done = subprocess.run([SCRIPT, "bench", "generate"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    steps = gpu_report.gather(tmp_path / "out")["steps"]
    assert {name for name, step in steps.items() if step["status"]} == {"bench_select"}
    assert steps["bench_select"]["status"] == 3 and "result" not in steps["bench_select"]
    assert steps["bench_merge"]["result"] == {"a": 1} and "bench.merge_states" in steps["bench_merge"]["command"]
    assert len(steps) == 13 and "broken" in done.stdout
    with tarfile.open(bundle) as archive:
        assert sum(name.endswith(".step") for name in archive.getnames()) == 13


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_script_says_where_no_gpu_is():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 1 and done.stderr == "torch sees no CUDA device here\n" and done.stdout == ""


def test_script_names_packages_that_are_missing(tmp_path):
    """All at once and first: each would take its part of the time before it failed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without what is installed
    python.chmod(0o755)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"PYTHON": str(python)}
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"missing Python packages: torch transformers .* hypothesis\n", done.stderr)


def test_script_fails_where_nothing_is_reported(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *gpu_report*) echo no GPU >&2; exit 3;; esac\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "FOLDER": str(tmp_path / "out")}
    done = subprocess.run([SCRIPT, "generate"], capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and done.stderr == "no GPU\n"


def test_steps_that_run_out_of_time_are_noted(tmp_path):
    """An interrupt comes first, so that a step can print what it has; the rest is told that no time is left."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\ncase "$*" in\n'
        "*bench.generate*) trap 'echo {}; exit 130' INT; sleep 9 & wait;;\n*) echo 1;;\nesac\n"
    )
    python.chmod(0o755)
    script = tmp_path / "bench" / "gpu_day.sh"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text().replace("TOTAL=510", "TOTAL=6"))
    (tmp_path / "smartkv_ext").mkdir()
    (tmp_path / "smartkv_ext" / "_C.abi3.so").touch()
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(["bash", script, "generate", "tests"], capture_output=True, text=True, env=environment)
    steps = gpu_report.gather(tmp_path / "build" / "gpu_day")["steps"]
    assert steps["generate"]["status"] == 124 and steps["generate"]["result"] == {}
    assert steps["tests"]["status"] == 124 and "no time left" in done.stdout
