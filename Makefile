# Two commands do everything on a machine with Python 3.10 - 3.12, git and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
VENV_OPENMMLAB ?= .venv-openmmlab
READY := $(VENV)/.ready
READY_OPENMMLAB := $(VENV_OPENMMLAB)/.ready

.PHONY: help env demo test test-all lint docs env-openmmlab test-openmmlab test-all-openmmlab clean

help:
	@echo "make demo            train student alone, with plain MSE and DiffKD on generated images; about 16 minutes"
	@echo "                     TASK=classification and TASK=segmentation do it for the other tasks"
	@echo "make test            run the quick tests, which cover every behavior; up to 10 minutes"
	@echo "make test-all        run all tests: also every config and model family, killed processes, wheels"
	@echo "make env             the environment in $(VENV) that both need (made by them if it is not there)"
	@echo "make lint            check formatting and lint"
	@echo "make docs            build the documentation in docs/_build/html"
	@echo "make test-openmmlab  run the quick tests with the original OpenMMLab packages; test-all-openmmlab runs all"
	@echo "make env-openmmlab   the environment in $(VENV_OPENMMLAB) that these need (made by them if it is not there)"

demo: $(READY)
	@echo "The demo takes about 16 minutes on two CPU cores, other tasks longer. Interrupted, it goes on where it stopped."
	$(VENV)/bin/python tools/demo.py $(TASK) $(ARGS)

# The tests of a file share what it trained, so they stay in one process.
PYTEST = $(<D)/bin/python -m pytest --numprocesses 2 --dist loadfile

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

$(READY): MMCV := onedl-mmcv
$(READY): PACKAGES := mminstall docs
$(READY): CONSTRAINTS := requirements/constraints.txt

$(READY_OPENMMLAB): MMCV := mmcv
$(READY_OPENMMLAB): PACKAGES := openmmlab
$(READY_OPENMMLAB): CONSTRAINTS := requirements/constraints-openmmlab.txt

# Both environments are made by the same steps, each in the folder of its .ready file.
# Interrupted, the installation goes on where it stopped: finished steps are found done.
BIN = $(@D)/bin
INSTALL = $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint $(CONSTRAINTS)
$(READY) $(READY_OPENMMLAB): requirements/*.txt setup.py
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and 'Python 3.10 - 3.12 is needed, this is ' + sys.version.split()[0] + '; set PYTHON=python3.11, say.')"
	@echo "Making the environment in $(@D), once: 15 - 20 minutes, most of it for compiling mmcv's operators."
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(@D)
	@echo "[1/5] torch and torchvision: 1 - 5 minutes ..."
	@$(INSTALL) torch torchvision
	@echo "[2/5] build tools ..."
	@$(INSTALL) --requirement requirements/build.txt
	@echo "[3/5] mmcv's operators: 10 - 15 minutes on two cores; seconds when pip has built them before ..."
	@MMCV_WITH_OPS=1 $(INSTALL) --no-build-isolation $(MMCV)
	@echo "[4/5] the other OpenMMLab packages and the test tools ..."
	@$(INSTALL) --no-build-isolation $(foreach name,runtime $(PACKAGES) tests,--requirement requirements/$(name).txt)
	@$(BIN)/python -c "import mmcv.ops" 2> /dev/null || { \
	    echo "      mmcv's operators in pip's cache were built for another torch; building them anew ..."; \
	    MMCV_WITH_OPS=1 $(INSTALL) --no-build-isolation --no-deps --no-cache-dir --force-reinstall $(MMCV); }
	@echo "[5/5] mmdiffkd itself ..."
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -W ignore -c "import mmcv.ops, mmdet, mmseg, mmpretrain, mmdiffkd"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_OPENMMLAB) build docs/_build *.egg-info
