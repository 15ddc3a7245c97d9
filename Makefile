# `make demo` and `make test` are the two commands of the README. Both create .venv first; PYTHON selects the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/demo
# one thread: the demo's nets are too small to gain from more, and threads that wait for each other suffer on a busy machine
export OMP_NUM_THREADS ?= 1

# the local Slurm cluster (slurm/local/README.md; needs root): test-slurm uses the one that is up here, else one of its own, which it ends
export C2G_SLURM_DIR ?= /tmp/c2g-slurm

.PHONY: demo test test-slurm test-browser slurm-up slurm-down lint install clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hpc_c2g needs Python >= 3.10; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/c2g demo run_dir=$(RUN_DIR) $(if $(filter quick,$(CHECK)),quick=true)

test: install
	$(BIN)/python -m pytest -m "not slurm and not browser" --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slurm: install
	$(BIN)/python -m pytest -m slurm -p no:xdist tests/slurm

test-browser: install
	$(BIN)/python -m pytest -m browser -p no:xdist tests/browser

slurm-up:
	slurm/local/up.sh

slurm-down:
	slurm/local/down.sh

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
