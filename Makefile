# Every target sets up what it needs in .venv first: only Python 3.11 or later and make are assumed.

PYTHON ?= python3
VENV := .venv
CREATED := $(VENV)/.created
RUNTIME := $(VENV)/.runtime-installed
DEVELOPMENT := $(VENV)/.development-installed
# Two at a time, each with files of its own: most of a test is compiling, which one thread does.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help train test test-slow lint format
.DEFAULT_GOAL := help

help:
	@echo "make train       train the small model on this machine; add flags with ARGS=--config.x.y=z"
	@echo "make test        ruff, then the tests that are not slow"
	@echo "make test-slow   the slow tests"
	@echo "make lint        ruff: rules and format"
	@echo "make format      let ruff format the code and mend what it can"
	@echo
	@echo "PYTHON=python3.12 chooses the Python that $(VENV) is made of (default: python3)."

train: $(RUNTIME)
	$(VENV)/bin/python train.py --config=configs/tiny.py --workdir=runs/tiny $(ARGS)

test: $(DEVELOPMENT)
	$(VENV)/bin/ruff check .
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEVELOPMENT)
	$(PYTEST) -m slow $(ARGS)

lint: $(DEVELOPMENT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(DEVELOPMENT)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Stamp files: what is older than a requirements file is installed again.  A .venv that somebody
# made by hand is used as it is; pip is the last thing venv writes, so one without it is half made.
$(CREATED):
	@command -v "$(PYTHON)" >/dev/null || \
	    { echo "error: there is no $(PYTHON); name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), and 3.11 or later is needed;" \
	    "name one: make PYTHON=python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || \
	    { echo "error: $(PYTHON) cannot make virtual environments;" \
	    "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@test -x $(VENV)/bin/pip || "$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

$(RUNTIME): requirements.txt $(CREATED)
	@echo "Installing into $(VENV) (once, about a minute)"
	@$(INSTALL) -r requirements.txt
	@touch $@

# Holds the runtime requirements too, so that stamp is written as well.
$(DEVELOPMENT): requirements-dev.txt requirements-tpu.txt requirements-eval.txt requirements.txt \
    $(CREATED)
	@echo "Installing into $(VENV), with what the tests need (once, about a minute)"
	@$(INSTALL) -r requirements-dev.txt
	@touch $(RUNTIME) $@
