# `make demo` and `make test` need only Python 3.11 or 3.12, git and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
VENV_OPENMMLAB ?= .venv-openmmlab
READY := $(VENV)/.ready
READY_OPENMMLAB := $(VENV_OPENMMLAB)/.ready

.PHONY: help env demo test test-all lint docs env-openmmlab test-openmmlab test-all-openmmlab test-gpu gpu clean

help:
	@echo "Get started:"
	@echo "  make env                 create the environment in $(VENV), once; up to 18 minutes"
	@echo "  make demo                train small detectors on generated images, alone and distilled; up to 5 minutes"
	@echo "                           options: make demo ARGS=--help"
	@echo "Develop:"
	@echo "  make test                run the quick tests, which cover every behavior; up to 10 minutes"
	@echo "                           some tests only: make test ARGS=tests/test_models"
	@echo "  make test-all            run all tests, also those of every config and model family"
	@echo "  make lint                check formatting and lint"
	@echo "  make docs                build the documentation in docs/_build/html"
	@echo "  make clean               remove environments and built files"
	@echo "Develop with the original OpenMMLab packages (mmcv, mmdet ...) instead of the maintained ones (onedl-mmcv ...):"
	@echo "  make env-openmmlab       create the environment in $(VENV_OPENMMLAB)"
	@echo "  make test-openmmlab      run the quick tests"
	@echo "  make test-all-openmmlab  run all tests"
	@echo "On a machine with a GPU:"
	@echo "  make test-gpu            run the tests that need a GPU"
	@echo "  make gpu                 run these tests and the GPU benchmarks; up to 22 minutes, tables in work_dirs/gpu"
	@echo "                           some stages only: make gpu ARGS='neck iteration'"
	@echo "Each target creates its environment if it is missing."

demo: $(READY)
	@echo "The demo takes at most 5 minutes on two idle CPU cores."
	$(VENV)/bin/python tools/demo.py $(ARGS)

# --dist loadfile runs all tests of a file in one process, because they share fixtures such as trained models.
# --no-loadscope-reorder keeps the order of the files. Otherwise, files with few tests, which may be slow, run last.
PYTEST = $(<D)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

test-openmmlab: $(READY_OPENMMLAB)
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all-openmmlab: $(READY_OPENMMLAB)
	$(PYTEST) $(ARGS)

test-gpu: $(READY)
	$(VENV)/bin/python -m pytest -m gpu tests/test_gpu.py $(ARGS)

gpu: $(READY)
	$(VENV)/bin/python -m benchmarks.gpu $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

docs: $(READY)
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build/html
	@echo "Open docs/_build/html/index.html."

env: $(READY)

env-openmmlab: $(READY_OPENMMLAB)

$(READY): FAMILY := onedl
$(READY_OPENMMLAB): FAMILY := openmmlab

# To resume an interrupted setup, run the same target again: make_env.py skips finished steps.
$(READY) $(READY_OPENMMLAB): requirements/*.txt requirements/*.py setup.py
	@$(PYTHON) requirements/make_env.py $(@D) --family $(FAMILY)

clean:
	rm -rf $(VENV) $(VENV_OPENMMLAB) build docs/_build *.egg-info
