# Everything runs in .venv; a machine needs Python 3.11 or newer, make and the package index.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build is a release of its own; a plain requirement for torch pulls gigabytes of CUDA.
TORCH := torch==2.13.0

.PHONY: demo test check bench clean
.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The Python inside of Triton's server has numpy 1: an environment of its own.
.venv/server/ready: .venv/core
	$(PYTHON) -m venv .venv/server
	.venv/server/bin/pip install --quiet --disable-pip-version-check --editable '.[triton-server]'
	@touch $@

demo: .venv/core ## build nano for the CPU in int4 and complete a prompt, drafting
	$(BIN)/step35-trt build-engine nano -o build/nano-cpu-int4 --engine cpu-int4
	$(BIN)/step35-trt generate build/nano-cpu-int4 --prompt "def read(self, size=-1):" --max-tokens 64

test: .venv/dev .venv/server/ready ## the whole suite, on every core, a file's fixtures made once
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: .venv/dev ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev ## what the README's figures come from
	$(BIN)/python -m benchmarks.mtp
	$(BIN)/python -m benchmarks.cpu_slice
	$(BIN)/python -m benchmarks.batching

clean:
	rm -rf .venv build
