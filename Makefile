# Every target sets up what it needs; `.ci/setup` says how. VENV=... puts the environment elsewhere.
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.ready
PYTEST_ARGS ?= -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types wheel docs-test bench clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make the environment in .venv (the other targets do it by themselves)

$(STAMP): pyproject.toml constraints.txt .ci/setup
	bash .ci/setup $(VENV)
	@touch $@

demo: $(STAMP)  ## train a language model with Inductor and with ciuic, and compare (under 4 minutes on 2 cores)
	PYTHONPATH=. $(PY) bench/demo.py --out out

test: $(STAMP)  ## run the test-suite (`make test PYTEST_ARGS="-k codec"` for a part of it)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(PY) -m mypy

wheel: $(STAMP)  ## build the wheel, check its contents, install it in an empty venv and compile a model there
	$(PY) .ci/check_wheel.py

docs-test: $(STAMP)  ## run the examples in README.md and docs/
	$(PY) -m pytest tests/test_docs.py

bench: $(STAMP)  ## measured saved bytes and gradient error of every model and mode
	PYTHONPATH=. $(PY) bench/saved.py --out out/saved.json

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
