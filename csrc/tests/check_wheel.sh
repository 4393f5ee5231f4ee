#!/usr/bin/env bash
# What a person would install, after `make wheel`: csrc/tests/check_wheel.sh [FOLDER WITH WHEEL AND SDIST]
#
# The wheel goes into a new virtual environment, which sees this one's torch and other packages but no compiler and not
# the source tree: there the command line compresses a document, and some tests run. The sdist has every file of its
# parts that git has, and installs from a folder elsewhere: CPU kernels alone and not optimised, for what matters is
# that nothing is missing. On a torch that knows no CUDA a wheel with CUDA kernels shows that it imports there.
#   PYTHON  interpreter of this environment (.venv/bin/python)
#   TESTS   what of python_tests to run (some 130 tests)
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
TESTS=${TESTS:-ops/test_op_core.py cli/test_cli.py}
dist=${1:-dist}
wheel=$(realpath "$dist"/*.whl)
sdist=$(realpath "$dist"/*.tar.gz)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# new_environment NAME: a virtual environment that sees the packages of this one, without its editable install: Python
# reads no .pth files of a folder that is itself named in one.
new_environment() {
  "$PYTHON" -m venv --without-pip "$folder/$1"
  "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
    "$("$folder/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
}

# installed NAME: what is imported there is what was installed there.
installed() {
  (cd "$folder" && "$folder/$1/bin/python" - << 'EOP')
import sys

import torch

import smartkv_ext
from smartkv_ext import ops

assert smartkv_ext.__file__.startswith(sys.prefix), f"not the one installed here: {smartkv_ext.__file__}"
cuda = "with" if ops.build_info()["cuda"] else "without"
print(f"smartkv_ext {smartkv_ext.__version__} {cuda} CUDA kernels, on torch {torch.__version__}")
EOP
}

echo "-- $(basename "$sdist"): complete"
tar -tzf "$sdist" | sed 's,^[^/]*/,,' | sort > "$folder/packed"
if git rev-parse --is-inside-work-tree > /dev/null 2>&1; then
  git ls-files csrc smartkv_ext CMakeLists.txt setup.py pyproject.toml README.md LICENSE .ci/constraints.txt | sort > "$folder/tracked"
  missing=$(comm -13 "$folder/packed" "$folder/tracked")
  [ -z "$missing" ] || { echo "the sdist lacks: $missing" >&2; exit 1; }
fi

echo "-- $(basename "$sdist"): installs elsewhere"
new_environment from_sources
(cd "$folder" && SMARTKV_CUDA=0 CXXFLAGS=-O0 from_sources/bin/python -m pip install -q --no-deps --no-build-isolation "$sdist")
installed from_sources

echo "-- $(basename "$wheel"): works without a compiler"
new_environment from_wheel
bin=$folder/from_wheel/bin
"$bin/python" -m pip install -q --no-deps "$wheel"
installed from_wheel
cp -r python_tests "$folder"
cd "$folder/python_tests"
alone=(env PATH="$bin" CC=no-compiler CXX=no-compiler)
for compiler in gcc g++ cc c++ clang nvcc; do
  ! "${alone[@]}" "$bin/python" -c "import shutil, sys; sys.exit(shutil.which('$compiler') is None)" || exit 1
done
"${alone[@]}" "$bin/smartkv" doctor > "$folder/doctor" || { cat "$folder/doctor"; exit 1; }
"${alone[@]}" "$bin/python" -c 'from cli.cli_runner import DOCUMENT; from hf.tiny import write_model
write_model("../model", DOCUMENT); open("../document.txt", "w").write(DOCUMENT)'
"${alone[@]}" "$bin/smartkv" generate --model ../model --document ../document.txt --question "Which number?" --budget 1/4
# shellcheck disable=SC2086  # a list of files
"${alone[@]}" "$bin/python" -m pytest -q -p no:cacheprovider -p no:benchmark -m "not slow and not gpu" \
  -W ignore::pytest.PytestUnknownMarkWarning $TESTS
