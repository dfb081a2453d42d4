# Two commands matter: `make compare` (set-up, then the main job on the bundled text) and `make test` (set-up, then every check).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-bench
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# The hook checks every shape annotation while the tests run; torch.compile cannot trace through it, so compile tests run apart.
PYTEST := $(BIN)/python -m pytest -q
HOOK := --jaxtyping-packages=gatework,beartype.beartype
WORKERS ?= 2
OLDEST := $(VENV)/oldest

.PHONY: compare test test-all lint bench docs clean

compare: $(BASE)
	$(BIN)/gatework compare --out runs/default

test: $(STAMP) lint
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not compile" $(HOOK)
	$(PYTEST) -n $(WORKERS) -m "compile and not slow"
	PYTHONPATH=$(OLDEST) $(PYTEST) -n $(WORKERS) -m "oldest and not slow" tests/models tests/surgery

test-all: $(STAMP) lint
	$(PYTEST) -n $(WORKERS) -m "not compile" $(HOOK)
	$(PYTEST) -n $(WORKERS) -m "compile"
	PYTHONPATH=$(OLDEST) $(PYTEST) -n $(WORKERS) -m "oldest" tests/models tests/surgery

lint: $(STAMP)
	$(BIN)/ruff check gatework tests benchmarks examples docs results
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/run.py

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(BASE): pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -r constraints-dev.txt
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt --editable ".[bench]"
	touch $(BASE)

$(STAMP): $(BASE) constraints-data.txt constraints-oldest.txt
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt --editable ".[bench,hf,postgres,docs,test]"
	$(BIN)/python -m pip install --quiet --no-deps -r constraints-data.txt
	rm -rf $(OLDEST) && $(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) -r constraints-oldest.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist docs/_build docs/parts docs/reference *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
