# Two commands do everything on a machine with Python 3.10 - 3.12, git and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
VENV_OPENMMLAB ?= .venv-openmmlab
READY := $(VENV)/.ready
READY_OPENMMLAB := $(VENV_OPENMMLAB)/.ready

.PHONY: help env demo test test-all lint docs env-openmmlab test-openmmlab test-all-openmmlab clean

help:
	@echo "make demo            train student alone, with plain MSE and DiffKD on generated images; at most 5 minutes"
	@echo "                     ARGS=--help lists the options"
	@echo "make test            run the quick tests, which cover every behavior; up to 10 minutes"
	@echo "make test-all        run all tests: also every config and model family, killed processes, wheels"
	@echo "make env             the environment in $(VENV) that both need (made by them if it is not there)"
	@echo "make lint            check formatting and lint"
	@echo "make docs            build the documentation in docs/_build/html"
	@echo "make test-openmmlab  run the quick tests with the original OpenMMLab packages; test-all-openmmlab runs all"
	@echo "make env-openmmlab   the environment in $(VENV_OPENMMLAB) that these need (made by them if it is not there)"

demo: $(READY)
	@echo "The demo takes at most 5 minutes on two idle CPU cores."
	$(VENV)/bin/python tools/demo.py $(ARGS)

# The tests of a file share what it trained, so they stay in one process. Files with few tests may take long, so they
# are not put last.
PYTEST = $(<D)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

test-openmmlab: $(READY_OPENMMLAB)
	$(PYTEST) -m "not slow" $(ARGS)

test-all-openmmlab: $(READY_OPENMMLAB)
	$(PYTEST) $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

docs: $(READY)
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build/html
	@echo "The documentation begins in docs/_build/html/index.html."

env: $(READY)

env-openmmlab: $(READY_OPENMMLAB)

$(READY): FAMILY := onedl
$(READY_OPENMMLAB): FAMILY := openmmlab

# Interrupted, it goes on where it stopped: finished steps are found done.
$(READY) $(READY_OPENMMLAB): requirements/*.txt requirements/*.py setup.py
	@$(PYTHON) requirements/make_env.py $(@D) --family $(FAMILY)

clean:
	rm -rf $(VENV) $(VENV_OPENMMLAB) build docs/_build *.egg-info
