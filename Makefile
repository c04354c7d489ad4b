# Set-up, demo and checks. Needs make and Python 3.10 or newer; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What `make demo` asks, and who invokes memory; all can be given on the command line.
IMAGE ?= examples/shelf.png
QUESTION ?= What does row 2 cost with its promotion?
INVOCATION ?= learned

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format docs docs-serve figures clean distclean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv and install the pinned dependencies
	@:

demo test: export OMP_WAIT_POLICY = PASSIVE
demo test: export HF_HUB_OFFLINE = 1
demo: export QUESTION := $(QUESTION)

demo: $(READY)  ## ask the pocket model about a picture (IMAGE=..., QUESTION=..., INVOCATION=...)
	@echo "$$QUESTION  ($(IMAGE))"
	@echo; echo "Without memory:"
	@$(BIN)/vismem ask "$(IMAGE)" "$$QUESTION" --invocation off
	@echo; echo "With memory, invoked when the model says so:"
	@$(BIN)/vismem ask "$(IMAGE)" "$$QUESTION" --invocation "$(INVOCATION)"

test: $(READY)  ## run the whole test suite
	@$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(READY)  ## check style, change nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)  ## check types: the package, and a user's code that is held to everything
	@$(BIN)/mypy

format: $(READY)  ## mend style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

docs-serve: $(READY)  ## show the documentation on this machine, and follow changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

figures: $(READY)  ## draw the figures in docs/images again
	@for name in mechanism sequence stages; do $(BIN)/python docs/draw_$$name.py || exit 1; done

clean:  ## remove caches and build products
	@rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache
	@find src tests docs examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove .venv as well
	@rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "vismem needs Python 3.10 or newer as '$(PYTHON)'; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed; Debian and Ubuntu keep it in the package python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (the first time this downloads a few gigabytes and takes some minutes) ..." >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,docs,dev]'
	@touch $@
