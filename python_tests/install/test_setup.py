"""What setup.py says without torch, and which build the Makefile's two commands take."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of setup.py, which builds nothing here."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def test_missing_torch_in_an_isolated_build(setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with pytest.raises(SystemExit) as plain:
        setup_py.torch_dir()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != sysconfig.get_path("purelib")])
    with pytest.raises(SystemExit) as hidden:
        setup_py.torch_dir()
    assert "torch >= 2.10" in str(plain.value) and "isolated" not in str(plain.value)
    assert "This is an isolated build" in str(hidden.value)
    assert str(hidden.value).endswith("pip install --no-build-isolation .")


@pytest.mark.parametrize(
    "argument, prefix, root, command",
    [
        ("editable_wheel", "/env", "/home/me/smartkv", "pip install --no-build-isolation -e ."),
        ("bdist_wheel", "/env", "/home/me/smartkv", "pip install --no-build-isolation ."),
        ("bdist_wheel", "/env", "/tmp/pip-req-build-x1", "pip install --no-build-isolation smartkv_ext-0.1.0.tar.gz"),
        ("bdist_wheel", "/tmp/build-env-x1", "/home/me/smartkv", "python -m build --no-isolation"),
        ("bdist_wheel", "/c/uv/builds-v0/.tmp1", "/home/me/smartkv", "uv pip install --no-build-isolation ."),
    ],
)
def test_command_fits_what_was_installed(
    setup_py: SimpleNamespace, argument: str, prefix: str, root: str, command: str
) -> None:
    assert setup_py.install_command(["setup.py", argument], prefix, Path(root)) == command


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as the Makefile looks at, with packages installed."""
    for name in ("setup.py", "pyproject.toml", "csrc/a.cpp", ".ci/constraints.txt", ".venv/.packages"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


def would_build(folder: Path, *goal: str) -> str | None:
    """What SMARTKV_CUDA is in the build that the goal needs, or None where none is needed."""
    command = ["env", "-u", "SMARTKV_CUDA", "-u", "MAKEFLAGS", "make", "-n", *goal]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    builds = [line.split("SMARTKV_CUDA=")[1].split()[0] for line in lines if "SMARTKV_CUDA=" in line]
    assert len(builds) <= 1
    return builds[0] if builds else None


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_each_command_takes_the_right_build(checkout: Path) -> None:
    built = checkout / ".venv/.built-0"
    if not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None:
        assert would_build(checkout, "demo") == "0", "nothing for a GPU that is not there"
        built.touch()
        assert would_build(checkout, "demo") is None
    built.touch()
    assert would_build(checkout, "build") == "auto", "the demo's build is not enough for the tests"
    assert would_build(checkout, "build", "SMARTKV_CUDA=0") is None
    built.rename(built.with_name(".built-auto"))
    assert would_build(checkout, "build") is None and would_build(checkout, "demo") is None
    assert would_build(checkout, "demo", "SMARTKV_CUDA=1") == "1"
    (checkout / "csrc/a.cpp").write_text("changed")
    assert would_build(checkout, "demo") == "auto", "else the tests would take the demo's build for theirs"
    assert would_build(checkout, "lint") is None, "linters need no compiler"
