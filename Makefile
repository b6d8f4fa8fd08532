# Two commands matter: `make demo` and `make test`. Each makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

# These work in one thread, or wait for processes of their own: two of them at a time.
ONE_THREAD := $(addprefix tests/test_,atomic.py compile.py cuda_emulated.py triton.py)

test: lint
	$(BIN)/python -m pytest -m "not slow" $(ONE_THREAD:%=--ignore=%)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal $(ONE_THREAD)

test-all: lint
	$(BIN)/python -m pytest $(ONE_THREAD:%=--ignore=%)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ONE_THREAD)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/gpt2_xl.py
	$(BIN)/python benchmarks/tables.py

# torch goes first and pinned: what comes after finds it there instead of fetching a build of its own.
$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The package itself, from this folder, and the native kernels into it.
$(VENV)/.ready: $(VENV)/.requirements pyproject.toml CMakeLists.txt $(wildcard src/fewbits/kernels/cpu/*.cpp src/fewbits/kernels/cpu/*.h)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build src/fewbits/kernels/cpu/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
