# Every target sets up what it needs first: only Python 3.11 or later, make and a C compiler are
# assumed.

PYTHON ?= python3
VENV := .venv
CREATED := $(VENV)/.created
RUNTIME := $(VENV)/.runtime-installed
DEVELOPMENT := $(VENV)/.development-installed
DOCUMENTATION := $(VENV)/.documentation-installed
# Three at a time, each with files of its own: on two cores, one of them waits now and then for
# processes that it started.  tests/conftest.py says which files come first.
PYTEST := bin/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder
INSTALL := bin/python -m pip install --quiet --disable-pip-version-check
# A lock is complete; were it to resolve dependencies again, older pips would meet newer releases.
INSTALL_LOCK := $(INSTALL) --no-deps --require-hashes
# The ranges of what the tests need: neither the site's, nor those of GPUs, which need a GPU.
RANGES := requirements.txt requirements-tpu.txt requirements-eval.txt \
    requirements-huggingface.txt requirements-dev.txt

.PHONY: help train test test-slow test-newest docs lock lint format
.DEFAULT_GOAL := help

help:
	@echo "make train        train the small model on this machine; add flags with ARGS=--config.x.y=z"
	@echo "make test         ruff, then the tests that are not slow"
	@echo "make test-slow    the slow tests"
	@echo "make test-newest  make test with the newest releases that requirements*.txt admit"
	@echo "make docs         the documentation site, build/docs/index.html"
	@echo "make lock         write the newest releases into requirements*.lock"
	@echo "make lint         ruff: rules and format"
	@echo "make format       let ruff format the code and fix what it can"
	@echo
	@echo "PYTHON=python3.12 chooses the Python that $(VENV) is made of (default: python3)."

train: $(RUNTIME)
	$(VENV)/bin/python train.py --config=configs/tiny.py --workdir=runs/tiny $(ARGS)

test: $(DEVELOPMENT)
	$(VENV)/bin/ruff check .
	$(VENV)/$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEVELOPMENT)
	$(VENV)/$(PYTEST) -m slow $(ARGS)

docs: $(DOCUMENTATION)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -q -W -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(DEVELOPMENT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(DEVELOPMENT)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What somebody who installs by hand gets today, in a virtual environment of its own.
test-newest:
	@$(MAKE) --no-print-directory VENV=.venv-newest .venv-newest/.created
	@echo "Installing the newest releases into .venv-newest"
	@.venv-newest/$(INSTALL) --upgrade --upgrade-strategy=eager $(RANGES:%=-r %)
	.venv-newest/bin/ruff check .
	.venv-newest/$(PYTEST) -m "not slow" $(ARGS)

# One version of each package for all Pythons and platforms (fewest), so that what was tested
# together on one is what the others install.
COMPILE := .venv-lock/bin/uv pip compile --config-file=requirements-lock.toml --quiet --upgrade \
    --universal --python-version=3.11 --fork-strategy=fewest --generate-hashes \
    --no-emit-index-url --annotation-style=line --custom-compile-command="make lock"

lock:
	@$(MAKE) --no-print-directory VENV=.venv-lock .venv-lock/.created
	@.venv-lock/$(INSTALL) uv==0.13.9
	$(COMPILE) --constraints=requirements-torch.lock --no-emit-package=torch \
	    --output-file=requirements-dev.lock $(RANGES)
	$(COMPILE) --constraints=requirements-dev.lock \
	    --output-file=requirements.lock requirements.txt

# Stamp files: what is older than a lock is installed again.  A .venv that somebody made by hand is
# used as it is; pip is the last thing venv writes, so one without it is incomplete.
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

$(RUNTIME): requirements.lock $(CREATED)
	@echo "Installing into $(VENV) (once, about a minute)"
	@$(VENV)/$(INSTALL_LOCK) -r requirements.lock
	@touch $@

$(DOCUMENTATION): requirements-docs.txt $(RUNTIME)
	@$(VENV)/$(INSTALL) -r requirements-docs.txt
	@touch $@

# The second lock holds the first, so that stamp is written as well.  PyTorch comes last and
# without hashes, for the reason in its file.
$(DEVELOPMENT): requirements-dev.lock requirements-torch.lock $(CREATED)
	@echo "Installing into $(VENV), with what the tests need (once, a few minutes)"
	@$(VENV)/$(INSTALL_LOCK) -r requirements-dev.lock
	@$(VENV)/$(INSTALL) -r requirements-torch.lock
	@touch $(RUNTIME) $@
