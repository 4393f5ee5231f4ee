# Two commands: `make demo` and `make test`. Both set everything up in .venv on the first call and are quick after that.
#   TORCH=...         what to install as torch where the environment has none (default: the version CI uses)
#   PYTHON=...        the interpreter that .venv is made from
#   SMARTKV_CUDA=1|0  compile the CUDA kernels always | never (default: where nvcc is; for the demo, where a GPU is too)
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install -q --disable-pip-version-check
LOCK   := .ci/constraints.txt
KERNELS := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal -p no:benchmark

# A stamp for what was compiled: .built-auto, .built-1 or .built-0. One at a time, as there is one place for libraries.
BUILT  := $(VENV)/.built-$(or $(SMARTKV_CUDA),auto)
# The demo takes what is there; otherwise it does not compile for a GPU that is not.
HAS_GPU = $(shell { test -e /dev/nvidia0 || nvidia-smi -L; } >/dev/null 2>&1 && echo yes)
DEMO_BUILT = $(if $(SMARTKV_CUDA)$(HAS_GPU),$(BUILT),$(firstword $(wildcard $(VENV)/.built-*) $(VENV)/.built-0))

.PHONY: demo test packages build cpp-test spills pytest compat slow-test lint format lock wheel check-wheel bench clean
.DELETE_ON_ERROR:

demo: $(DEMO_BUILT)
	$(BIN)/smartkv demo

# One after the other, with the seconds that each took.
TEST_PARTS := packages lint build cpp-test spills pytest compat check-wheel
test:
	@for part in $(TEST_PARTS); do \
	  begin=$$(date +%s); echo "== $$part"; \
	  $(MAKE) --no-print-directory $$part || { echo "== $$part failed"; exit 1; }; \
	  times="$$times, $$part $$(($$(date +%s) - begin))"; \
	done; echo "== seconds:$${times#,}"

# All packages in known versions, and torch only where there is none: which build of it fits is up to the GPU.
$(VENV)/.packages: $(LOCK)
	@echo "installing packages into $(VENV): half a minute, and what the network takes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --no-deps -r $(LOCK)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	rm -rf $(VENV)/compat
	touch $@

packages: $(VENV)/.packages

$(VENV)/.built-%: $(VENV)/.packages $(KERNELS) setup.py pyproject.toml
	rm -f $(VENV)/.built-*
	@echo "compiling the extension: one to two minutes, with CUDA kernels five more, unless it was done before"
	PYTHONWARNINGS="ignore:Editable installation" SMARTKV_CUDA=$* $(PIP) --no-deps --no-build-isolation -e .
	touch $@

build: $(BUILT)

# The plain tests link the library that the extension has; the sanitised ones compile their own.
CORE = $(shell $(BIN)/python -c "import sys, sysconfig as s; print(s.get_platform(), sys.implementation.cache_tag, sep='-')")
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
CTEST := $(BIN)/ctest --output-on-failure -j $(shell nproc)
cpp-test: $(BUILT)
	$(CMAKE) -B build/core -DSMARTKV_CORE=$(CURDIR)/build/$(CORE)/libsmartkv_core.a
	$(BIN)/cmake --build build/core
	$(CTEST) --test-dir build/core
	$(CMAKE) -B build/sanitize -DSMARTKV_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	$(CTEST) --test-dir build/sanitize

# Registers of the CUDA kernels, from the build of the extension.
spills: $(BUILT)
	$(BIN)/python csrc/tests/check_spills.py

pytest: $(BUILT)
	$(PYTEST) -m "not slow and not gpu" --durations=15

# The oldest transformers that is supported and the newest that is published. VERSIONS="5.18.0 ...": those instead.
compat: $(BUILT)
	$(BIN)/python .ci/compat.py $(VERSIONS)

# Real models: downloads the embedded model, and takes a Qwen2.5 folder from SMARTKV_QWEN where there is one.
slow-test: $(BUILT)
	$(BIN)/python -m pytest -q -m "slow and not gpu"

lint: $(VENV)/.packages
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.packages
	$(BIN)/clang-format -i $(KERNELS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The newest versions that fit together, for Python 3.10 to 3.13. Torch is left out, and with it gigabytes of CUDA.
lock:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c $(LOCK) uv
	echo "torch ; sys_platform == 'never'" | \
	  $(BIN)/uv pip compile -q --upgrade --universal --python-version 3.10 \
	  --all-extras --group tools --group torch --override /dev/stdin --no-emit-package torch --no-annotate \
	  --custom-compile-command "make lock" pyproject.toml -o $(LOCK)

# In dist/ a wheel for this Python that runs on other machines too, and the sources. Torch's libraries stay torch's.
wheel: $(BUILT)
	rm -rf build/lib.* build/bdist.* build/dist dist
	$(BIN)/pyproject-build --no-isolation --sdist --wheel -o build/dist . > build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/dist/*.whl
	mv build/dist/*.tar.gz dist

check-wheel: wheel
	csrc/tests/check_wheel.sh

bench: $(BUILT)
	$(BIN)/python -m bench.all
	$(BIN)/python -m bench.generate --context 2048 8192

clean:
	rm -rf build dist $(VENV) smartkv_ext/*.so *.egg-info
