"""The integration tests against other releases of transformers: python .ci/compat.py [VERSION]...

Without arguments the oldest supported and the newest published one. Each lies in a folder of its own beside the
environment's packages and comes first on PYTHONPATH, together with what it needs in other versions than the environment
has. A folder is filled once; offline, the newest is the newest one that was filled. Exit status 1 where a test fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from importlib.metadata import version as installed
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = Path(sys.prefix) / "compat"
PARTS = ("hf", "cache", "policies", "cli")  # of python_tests: what goes through transformers
OPTIONS = [
    "-q",
    "--tb=line",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
    "-n",
    "logical",
    "--maxprocesses",
    "8",
    "--dist",
    "worksteal",
]


def supported() -> Requirement:
    """The range of transformers in pyproject.toml, which Python 3.10 has no module to parse."""
    found = re.search(r'"(transformers[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return Requirement(found[1])


def would_install(*arguments: str) -> dict[str, str] | None:
    """Versions that pip would install into this environment, or None where it cannot find out."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print("\n".join(done.stderr.strip().splitlines()[-2:]), file=sys.stderr)
        return None
    packages = json.loads(done.stdout)["install"]
    return {package["metadata"]["name"]: package["metadata"]["version"] for package in packages}


def published(requirement: str) -> str | None:
    """The newest release for this Python that pip finds."""
    found = would_install("--ignore-installed", "--no-deps", requirement)
    return found["transformers"] if found else None


def newest(supported: Requirement) -> tuple[str, list[str]]:
    """The newest release that pyproject.toml allows, and what has to be said of it."""
    version = published("transformers")
    if version is None:
        known = [path.name for path in FOLDERS.glob("[0-9]*.*[0-9]")] + [installed("transformers")]
        return max(known, key=Version), ["the newest release could not be looked up: this is the newest one known here"]
    if version in supported.specifier:
        return version, []
    allowed = published(str(supported)) or installed("transformers")
    return allowed, [f"transformers {version} is published, but pyproject.toml allows {supported.specifier} only"]


def fill(version: str) -> Path | None:
    """A folder with that release and what it needs beside this environment; None where it cannot be had."""
    folder = FOLDERS / version
    if folder.is_dir():
        return folder
    packages = would_install(f"transformers=={version}")
    if packages is None:
        return None
    print(f"transformers {version} needs beside this environment: {packages}", flush=True)
    filling = FOLDERS / f".filling-{version}"
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir(parents=True)
    if packages:
        pins = [f"{name}=={number}" for name, number in packages.items()]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(filling), *pins]
        if subprocess.run(command, check=False).returncode:
            return None
    filling.rename(folder)
    return folder


def run(version: str, folder: Path) -> dict[str, int]:
    """Numbers of tests by outcome."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    code = "import transformers; print(transformers.__version__)"
    seen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == version, f"{folder} gives transformers {seen.stdout.strip()}"
    report = FOLDERS / f"{version}.xml"
    report.unlink(missing_ok=True)
    tests = [f"python_tests/{part}" for part in PARTS]
    command = [sys.executable, "-m", "pytest", *OPTIONS, "-m", "not slow and not gpu", f"--junitxml={report}", *tests]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not report.is_file():  # pytest itself failed
        return {"passed": 0, "failed": 1, "skipped": 0}
    suite = next(ET.parse(report).iter("testsuite"))
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return {"passed": total - failed - skipped, "failed": failed or int(status != 0), "skipped": skipped}


def plan(versions: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Which releases in which role, and what has to be said of them."""
    if versions:
        return [("asked for", version) for version in versions], []
    allowed = supported()
    oldest = next(part.version for part in allowed.specifier if part.operator == ">=")
    latest, notes = newest(allowed)
    return [("oldest", oldest + ".0" * (2 - oldest.count("."))), ("newest", latest)], notes


def attempt(role: str, version: str) -> tuple[str, bool]:
    """What the table says of a release, and whether it works."""
    if role == "newest" and version == installed("transformers"):
        return "in this environment: make pytest has the same tests", True
    folder = fill(version)
    if folder is None:
        return "could not be installed", False
    begin = time.monotonic()
    counts = run(version, folder)
    numbers = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    return f"{numbers}, {time.monotonic() - begin:.0f} s", not counts["failed"]


def main(versions: list[str]) -> None:
    """Run all, print the table."""
    FOLDERS.mkdir(exist_ok=True)
    todo, notes = plan(versions)
    rows = [(role, version, *attempt(role, version)) for role, version in todo]
    print(f"\n{supported()} is supported; {installed('transformers')} is in this environment")
    for role, version, text, _ in rows:
        print(f"{role:10} {version:10} {text}")
    for note in notes:
        print(f"note: {note}")
    bad = [version for *_, version, _, works in rows if not works]
    for version in bad:
        print(f"FAILED: smartkv_ext does not work with transformers {version} (PYTHONPATH={FOLDERS / version})")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
