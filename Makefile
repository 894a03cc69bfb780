# Everything sets itself up: `make demo` on a fresh machine with Python 3.11 or 3.12 is all it takes.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
PY     ?= python3

export OMP_NUM_THREADS ?= 1
# Each of the many processes that tests start would compile every source again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL = help
# The oldest and the newest Triton that the kernels are tested with, besides the one in constraints.txt; 3.6 needs an older NumPy.
OLDEST  = $(VENV)/triton-3.6.0
NEWEST  = $(VENV)/triton-3.9.0

.PHONY: help install demo test test-triton check format gpu clean

help:
	@echo "make demo     train on handwritten digits with 30 % of the entries missing, evaluate, draw (minutes on 2 cores)"
	@echo "make test     the whole test suite, then the kernels again under Triton's interpreter"
	@echo "make test-triton  the kernels under the oldest and the newest Triton's interpreter"
	@echo "make check    format, lint, types, import contracts"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make gpu      GPU tests, benchmarks and a short training with PY=$(PY) as it is (nothing is installed)"
	@echo "make install  only the set-up into $(VENV)"
	@echo "make clean    remove caches and build outputs (never $(VENV), never runs/)"

install: $(STAMP)

# torch first and alone: the constraints pin it, and every other package is resolved around it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed, this is " \
	    + sys.version.split()[0] + "; say make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,triton,deepspeed]"
	touch $@

demo: $(STAMP)
	$(BIN)/meme-dist train digits --missing 0.3

test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -n 2 -q

# The sanitizer's own tests, and values and gradients of every case in float32. 3.6 converts arrays in a way that NumPy deprecates.
test-triton: $(OLDEST)/.installed $(NEWEST)/.installed
	for folder in $(OLDEST) $(NEWEST); do \
	    PYTHONPATH=$$folder TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q -W "ignore:Conversion of an array:DeprecationWarning" \
	        tests/kernels/test_sanitizer.py tests/kernels/test_catalogue.py \
	        -k "sanitizer or (test_value_and_gradients and float32)" || exit 1; \
	done

$(OLDEST)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) triton==3.6.0 "numpy<2.4"
	touch $@

$(NEWEST)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $(NEWEST) triton==3.9.0
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu:
	@$(PY) launch/gpu.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
