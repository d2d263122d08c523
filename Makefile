# Every target makes its own .venv from constraints.txt; PYTHON=python3.12 chooses the interpreter,
# VENV=... another place, VENV_READY=1 uses VENV as it is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ifdef VENV_READY
STAMP :=
else
STAMP := $(VENV)/.installed
endif
SOURCES := mst_fx passes tools tests examples

# make test ARGS=tests/ops runs a part; ARGS=--cpu-times=FILE says what each test costs. A file's tests
# stay in one process, which imports and compiles for all of them.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: venv demo test test-fast test-gpu lint dist bench-cpu bench-gpu clean
.DEFAULT_GOAL := test

venv: $(STAMP)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m tools.demo

test: $(STAMP)
	$(PYTEST) $(ARGS)

# The inner loop: toys alone, without Inductor, processes of their own and what takes longer than a second and a half;
# of random bodies the first ten.
test-fast: $(STAMP)
	$(PYTEST) --hypothesis-profile=shortest -m "not slow and not real_model and not browser and not gpu" $(ARGS)

# What needs a CUDA device, in one process.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu --maxfail 5 --tb short $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy mst_fx tools tests
	$(BIN)/lint-imports --no-cache

# Needs the network for its tools, which nothing else here does.
dist: $(STAMP)
	$(BIN)/python -m pip install --quiet 'build>=1.3' 'twine>=6'
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

bench-gpu: $(STAMP)
	$(BIN)/python -m tools.bench --out benchmarks/gpu

bench-cpu: $(STAMP)
	$(BIN)/python -m tools.bench.memory --out benchmarks/memory
	$(BIN)/python -m tools.bench.compile --out benchmarks/compile
	$(BIN)/python -m tools.bench.accumulation --out benchmarks/accumulation

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info
