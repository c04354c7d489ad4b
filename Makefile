# Set-up, demo and checks. Needs make and Python 3.10 or newer; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# What `make demo` asks, and which invocation policy it uses.
IMAGE ?= examples/shelf.png
QUESTION ?= What does row 2 cost with its promotion?
INVOCATION ?= learned

# What `make test` and `make coverage` run; the whole suite if empty.
TESTS ?=
PYTEST := $(BIN)/python -m pytest -n auto --dist loadgroup

# What `make coverage` reports first.
METHOD := src/vismem/memory/*,src/vismem/reading/*,src/vismem/decoding/*,src/vismem/training/*

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage lint types format docs docs-serve figures clean distclean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## create .venv with everything development needs, at pinned versions
	@:

demo test coverage: export OMP_WAIT_POLICY = PASSIVE
demo test coverage: export HF_HUB_OFFLINE = 1
demo: export QUESTION := $(QUESTION)

demo: $(CORE)  ## ask the pocket model about an image (IMAGE=..., QUESTION=..., INVOCATION=...)
	@echo "$$QUESTION  ($(IMAGE))"
	@echo; echo "Without memory:"
	@$(BIN)/vismem ask "$(IMAGE)" "$$QUESTION" --invocation off
	@echo; echo "With memory, invoked when the model says so:"
	@$(BIN)/vismem ask "$(IMAGE)" "$$QUESTION" --invocation "$(INVOCATION)"

test: $(READY)  ## run the tests (TESTS=... for some of them)
	@$(PYTEST) $(TESTS)

coverage: $(READY)  ## run the tests and report their coverage, the method first (TESTS=...)
	@status=0; $(PYTEST) --cov --cov-report= $(TESTS) || status=$$?; \
	  echo; echo "The method:"; $(BIN)/coverage report --include='$(METHOD)'; \
	  echo; echo "Everything else:"; $(BIN)/coverage report --omit='$(METHOD)'; \
	  exit $$status

lint: $(READY)  ## check style and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

types: $(READY)  ## type-check the package and code that uses it
	@$(BIN)/mypy

format: $(READY)  ## fix style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

docs-serve: $(READY)  ## serve the documentation locally and reload on changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

figures: $(READY)  ## redraw the figures in docs/images
	@for name in mechanism sequence stages; do $(BIN)/python docs/draw_$$name.py || exit 1; done

clean:  ## remove caches and build products
	@rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage .coverage.*
	@find src tests docs examples benchmarks experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove .venv as well
	@rm -rf $(VENV)

# The package and its dependencies, without extras.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "vismem needs Python 3.10 or newer as '$(PYTHON)'; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	@echo "Installing vismem into $(VENV): the first time, this downloads PyTorch and takes a few minutes ..." >&2
	@$(PIP_INSTALL) -e .
	@touch $@

$(READY): $(CORE)
	@echo "Installing the extras and development tools into $(VENV) ..." >&2
	@$(PIP_INSTALL) -e '.[all,docs,dev]'
	@touch $@
