"""The versions of .ci/constraints.txt, and the other releases of transformers that .ci/compat.py runs."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.metadata import version as installed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10.13", "3.11.7", "3.12.1", "3.13.0")


def constraints(python: str) -> dict[str, list[str]]:
    """Versions by package, on Linux and that Python."""
    environment = {"python_version": python.rsplit(".", 1)[0], "python_full_version": python}
    found: dict[str, list[str]] = {}
    for line in (ROOT / ".ci/constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==" and not Version(pin.version).local, line
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


def required() -> list[Requirement]:
    """Everything that pyproject.toml names; Python 3.10 cannot parse TOML."""
    text = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    lists = re.findall(r"^(?:dependencies|requires|\w+) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    names = [name for items in lists for name in re.findall(r'"([^"]+)"', items)]
    return [Requirement(name) for name in names if name not in ("version", "LICENSE")]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_hold_what_pyproject_requires(python: str) -> None:
    pinned = constraints(python)
    assert all(len(versions) == 1 for versions in pinned.values()), "one version of each package for one Python"
    names = {requirement.name for requirement in required()}
    assert {"torch", "transformers", "pytest", "ruff", "gguf", "ninja", "auditwheel", "scikit-learn"} <= names
    for requirement in required():
        if requirement.name == "torch":
            continue
        assert pinned[canonicalize_name(requirement.name)][0] in requirement.specifier, requirement


def test_constraints_leave_torch_to_the_machine() -> None:
    for python in PYTHONS:
        names = constraints(python)
        assert "torch" not in names and not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


@pytest.fixture
def compat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """.ci/compat.py with a folder of its own; its functions see what is set with ``patch``."""
    namespace = runpy.run_path(str(ROOT / ".ci/compat.py"))
    inside = namespace["main"].__globals__
    monkeypatch.setitem(inside, "FOLDERS", tmp_path)
    monkeypatch.setitem(inside, "fill", lambda version: tmp_path / version)

    def patch(**functions: Any) -> None:
        for name, function in functions.items():
            monkeypatch.setitem(inside, name, function)

    return SimpleNamespace(patch=patch, **{name: namespace[name] for name in ("main", "newest", "supported")})


def counts(failed: int) -> dict[str, int]:
    return {"passed": 7, "failed": failed, "skipped": 0}


def test_a_newest_release_that_fails_is_named(compat: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    compat.patch(published=lambda _: "5.99.1", run=lambda version, _: counts(2 if version == "5.99.1" else 0))
    with pytest.raises(SystemExit) as end:
        compat.main([])
    out = capsys.readouterr().out.splitlines()
    assert end.value.code == 1 and out[-1].startswith("FAILED: smartkv_ext does not work with transformers 5.99.1 (")
    assert any(line.startswith("oldest     5.17.0     7 passed, 0 failed") for line in out)
    assert any(line.startswith("newest     5.99.1     7 passed, 2 failed") for line in out)


def test_what_is_installed_does_not_run_twice(compat: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    compat.patch(published=lambda _: installed("transformers"), run=lambda version, _: ran.append(version) or counts(0))
    with pytest.raises(SystemExit) as end:
        compat.main([])
    assert end.value.code == 0 and ran == ["5.17.0"] and "make pytest has the same tests" in capsys.readouterr().out


def test_newest_release_offline_or_out_of_range(compat: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("5.9.0", "5.98.0", ".filling-5.99.0", "5.99.0.xml"):
        (tmp_path / name).mkdir()
    compat.patch(published=lambda _: None)
    version, notes = compat.newest(compat.supported())
    assert version == "5.98.0" and "could not be looked up" in notes[0]
    compat.patch(published=lambda requirement: "6.1.0" if requirement == "transformers" else "5.97.0")
    version, notes = compat.newest(compat.supported())
    assert version == "5.97.0"
    assert notes == ["transformers 6.1.0 is published, but pyproject.toml allows <6,>=5.17 only"]


def test_versions_may_be_named(compat: SimpleNamespace) -> None:
    ran = []
    compat.patch(run=lambda version, _: ran.append(version) or counts(0))
    with pytest.raises(SystemExit) as end:
        compat.main(["5.18.0", "5.20.0"])
    assert end.value.code == 0 and ran == ["5.18.0", "5.20.0"]


def test_supported_is_what_pyproject_says(compat: SimpleNamespace) -> None:
    assert str(compat.supported()) == str(next(r for r in required() if r.name == "transformers"))
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in {python.rsplit(".", 1)[0] for python in PYTHONS}
