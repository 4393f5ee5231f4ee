# Two commands: `make demo` and `make test`. Both set everything up in .venv on the first call and are quick after that.
#   TORCH=...   what to install as torch where the environment has none (default: the version CI uses)
#   PYTHON=...  the interpreter that .venv is made from
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml

.PHONY: demo test cpp-test spills pytest slow-test lint format bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/smartkv demo

test: cpp-test spills pytest lint

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja pybind11 cmake
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[test,train,gguf]"
	touch $@

cpp-test: $(VENV)/.torch
	$(BIN)/cmake -S . -B build/core -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/core
	$(BIN)/ctest --test-dir build/core --output-on-failure
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DSMARTKV_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# Registers of the CUDA kernels, from the build of the extension.
spills: $(VENV)/.built
	$(BIN)/python csrc/tests/check_spills.py

pytest: $(VENV)/.built
	$(BIN)/python -m pytest -q -m "not slow and not gpu" --durations=15

# Real models: downloads the embedded model, and takes a Qwen2.5 folder from SMARTKV_QWEN where there is one.
slow-test: $(VENV)/.built
	$(BIN)/python -m pytest -q -m "slow and not gpu"

lint: $(VENV)/.built
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.built
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.built
	$(BIN)/python -m bench.all
	$(BIN)/python -m bench.generate --context 2048 8192

clean:
	rm -rf build $(VENV) smartkv_ext/*.so *.egg-info
