# make help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*## /make \1 \t/p' $(MAKEFILE_LIST) | expand -t 20

$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(READY)  ## make .venv and install everything into it

train: install  ## train a classifier on scanned digits; KEYS="solver.max_epoch=5" sets keys
	$(BIN)/tritoncls train $(KEYS)

test: install  ## check notebooks, export, README, style; run all quick tests
	$(BIN)/python tools/check.py

test-slow: install  ## run the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not alone" -n 2
	$(BIN)/python -m pytest -m alone

test-floor: install  ## run the kernels' tests with the oldest PyTorch and Triton allowed, in .venv-floor
	$(BIN)/python tools/floor.py

bench: install  ## measure the kernels beside what one would use instead; ARGS="loss --json benchmarks/results"
	$(BIN)/tritoncls bench $(ARGS)

notebooks: install  ## run every notebook and save its outputs
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/python tools/readme.py

export: install  ## write the package from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/python tools/stub.py

readme: install  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

lab: install  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

.PHONY: help install train test test-slow test-floor bench notebooks export readme lab
