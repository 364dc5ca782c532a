PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help setup demo test test-all lint

help:  ## these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/  /'

setup: $(VENV)/ready  ## a virtual environment with everything in requirements-dev.txt

# natten builds CUDA kernels from source where it sees a GPU: hide it, and go on without natten if it does not install.
$(VENV)/ready: requirements.txt requirements-extra.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	CUDA_VISIBLE_DEVICES= $(RUN) -m pip install --quiet natten || echo "natten did not install: everything runs without it"
	touch $@

demo: setup  ## train both stages on real digits, sample, measure (about 8 minutes on 2 CPU cores)
	$(RUN) train_vqgan.py
	$(RUN) train_sampler.py --sampler absorbing
	$(RUN) experiments/get_samples.py
	$(RUN) experiments/calc_FID.py
	$(RUN) experiments/check_digits.py

test: setup  ## the test suite (under 6 minutes on 2 CPU cores)
	$(RUN) -m pytest

test-all: setup  ## the slow tests too
	$(RUN) -m pytest -m ""

lint: setup  ## ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
