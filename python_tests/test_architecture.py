"""The layout is a promise: who may depend on whom, where torch headers may appear, how long a file may get."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smartkv_ext"
MAX_LINES = 400
TOP_LEVEL = {
    "csrc", "smartkv_ext", "python_tests", "bench", "training", "docs", "setup.py", "CMakeLists.txt", "pyproject.toml",
    "Makefile", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
}  # fmt: skip

# What each part of the package may import from the others. Order is the dependency direction.
ALLOWED = {
    "reference": set(),
    "ops": {"_C", "_core", "reference"},
    "quant": {"ops", "reference"},
    "gates": {"ops", "reference"},
    "policies": {"ops", "reference", "gates"},
    "cache": {"ops", "quant", "policies", "gates", "reference"},
    "hf": {"ops", "quant", "policies", "gates", "reference", "cache"},
    "eval": {"ops", "quant", "policies", "gates", "reference", "cache", "hf"},
}


def tracked(*patterns):
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    files = [ROOT / line for line in out.stdout.splitlines()]
    return [f for f in files if f.exists()] if out.returncode == 0 else [f for p in patterns for f in ROOT.rglob(p)]


def imports(path):
    """Absolute names of everything that a module imports."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = f"{base}.{node.module}" if node.level and node.module else node.module or base
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_dependency_direction(part):
    for path in (PACKAGE / part).rglob("*.py"):
        for name in imports(path):
            if name.startswith("smartkv_ext."):
                target = name.split(".")[1]
                assert target == part or target in ALLOWED[part], f"{path.relative_to(ROOT)} imports {name}"


def test_reference_depends_on_torch_alone():
    standard = {"__future__", "dataclasses", "functools", "math", "collections"}
    for path in (PACKAGE / "reference").glob("*.py"):
        for name in imports(path):
            first = name.split(".")[0]
            assert first in standard | {"torch"} or name.startswith("smartkv_ext.reference"), (
                f"{path.name} imports {name}"
            )


def test_only_the_integration_knows_transformers():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0]
        if part not in ("hf", "cache", "eval", "cli"):
            assert not any(name.startswith("transformers") for name in imports(path)), path


def test_torch_headers_stay_in_the_binding():
    for path in tracked("csrc/*.h", "csrc/*.cpp", "csrc/*.cu", "csrc/*.cuh"):
        if path.relative_to(ROOT).parts[1] != "torch":
            assert "#include <torch" not in path.read_text(), path
    for path in tracked("csrc/torch/*"):
        text = path.read_text()
        assert "ATen/" not in text and "c10/" not in text, f"{path} leaves the stable ABI"


def test_bindings_compile_against_torch_2_10():
    """As far as no such torch is needed to tell: names of its headers that came later, which were used here before."""
    newer = {"STABLE_TORCH_ERROR_CODE_CHECK"}
    for path in tracked("csrc/torch/*"):
        assert not {name for name in newer if name in (ROOT / path).read_text()}, path


def test_files_stay_small():
    for path in tracked("*.py", "*.h", "*.cpp", "*.cu", "*.cuh"):
        lines = path.read_text().count("\n")
        assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def test_top_level():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
    assert {"csrc", "smartkv_ext", "python_tests", "bench", "training", "setup.py", "CMakeLists.txt"} <= names


def test_importing_the_package_is_cheap():
    code = "import sys, smartkv_ext; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([__import__("sys").executable, "-c", code], check=True, cwd=ROOT)
