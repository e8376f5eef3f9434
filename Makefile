# Two commands do everything on a machine with Python 3.10 - 3.12, git and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CONSTRAINTS := --constraint requirements/constraints.txt

.PHONY: help env demo test lint clean

help:
	@echo "make demo   train teacher, student alone, plain MSE and DiffKD on generated images; about 15 minutes"
	@echo "make test   run all tests; at most 20 minutes"
	@echo "make env    the environment in $(VENV) that both need (made by them if it is not there)"
	@echo "make lint   check formatting and lint"

demo: $(READY)
	@echo "The demo takes about 15 minutes on two CPU cores. Interrupted, it goes on where it stopped."
	$(BIN)/python tools/demo.py

test: $(READY)
	@echo "The tests take at most 20 minutes on two CPU cores."
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

env: $(READY)

# Interrupted, the installation goes on where it stopped: finished steps are found done.
$(READY): requirements/*.txt setup.py
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and 'Python 3.10 - 3.12 is needed, this is ' + sys.version.split()[0] + '; set PYTHON=python3.11, say.')"
	@echo "Making the environment in $(VENV), once: 15 - 20 minutes, most of it for compiling mmcv's operators."
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "[1/5] torch and torchvision: 1 - 5 minutes ..."
	@$(PIP) install $(CONSTRAINTS) torch torchvision
	@echo "[2/5] build tools ..."
	@$(PIP) install $(CONSTRAINTS) --requirement requirements/build.txt
	@echo "[3/5] mmcv's operators: 10 - 15 minutes on two cores; seconds when pip has built them before ..."
	@MMCV_WITH_OPS=1 $(PIP) install $(CONSTRAINTS) --no-build-isolation onedl-mmcv
	@echo "[4/5] the other OpenMMLab packages and the test tools ..."
	@$(PIP) install $(CONSTRAINTS) --no-build-isolation --requirement requirements.txt
	@$(BIN)/python -c "import mmcv.ops" 2> /dev/null || { \
	    echo "      mmcv's operators in pip's cache were built for another torch; building them anew ..."; \
	    MMCV_WITH_OPS=1 $(PIP) install $(CONSTRAINTS) --no-build-isolation --no-deps --no-cache-dir --force-reinstall onedl-mmcv; }
	@echo "[5/5] mmdiffkd itself ..."
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c "import mmcv.ops, mmdet, mmseg, mmpretrain, mmdiffkd"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
