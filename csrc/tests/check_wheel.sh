#!/usr/bin/env bash
# A wheel with CUDA kernels on the torch of this environment: csrc/tests/check_wheel.sh [WHEEL]
#
# Builds the wheel unless one is given (needs nvcc; some four minutes of two cores), installs it in a new virtual
# environment that also sees this one's packages, and runs the op tests of the CPU on it, away from the source tree.
# Where torch knows no CUDA this shows that such a wheel imports and runs there.
#   PYTHON  interpreter of this environment (python3)
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
wheel=${1:-}
if [ -z "$wheel" ]; then
  SMARTKV_CUDA=1 "$PYTHON" -m pip wheel -q --no-build-isolation --no-deps -w "$folder" .
  wheel=$(ls "$folder"/*.whl)
fi
"$PYTHON" -m venv "$folder/venv"
installed=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$installed/beside.pth"
"$folder/venv/bin/python" -m pip install -q --no-deps "$wheel"
cp -r python_tests "$folder"
cd "$folder/python_tests"
"$folder/venv/bin/python" - "$installed" <<'EOF'
import sys

import torch

import smartkv_ext
from smartkv_ext import ops

assert smartkv_ext.__file__.startswith(sys.argv[1]), f"not the wheel's: {smartkv_ext.__file__}"
info = ops.build_info()
assert info["cuda"], "the wheel was built without CUDA"
print(f"smartkv_ext {info['version']}, built with CUDA, on torch {torch.__version__}, CUDA {torch.version.cuda}")
EOF
"$folder/venv/bin/python" -m pytest -q -p no:cacheprovider -m "not slow and not gpu" ops
