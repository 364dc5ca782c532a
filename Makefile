PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
RUN := $(VENV)/bin/python

.PHONY: help setup demo demo-ddpm demo-layout demo-captions app test test-all test-oldest fuzz lint

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/  /'

setup: $(VENV)/dev  ## create a virtual environment with all of requirements-dev.txt

# The empty files core, extra and dev say which requirements are installed.
$(VENV)/core: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install -r requirements.txt
	touch $@

$(VENV)/extra: $(VENV)/core requirements-extra.txt
	$(RUN) -m pip install -r requirements-extra.txt
	touch $@

# natten is built from source: --no-build-isolation keeps pip from downloading a second torch for the build, and hiding the
# GPU keeps it from compiling CUDA kernels. Everything runs without natten, so a failed build is ignored.
$(VENV)/dev: $(VENV)/extra requirements-dev.txt
	$(RUN) -m pip install -r requirements-dev.txt
	$(RUN) -m pip install "setuptools>=70.1" wheel "build>=1.3"
	CUDA_VISIBLE_DEVICES= $(RUN) -m pip install --no-build-isolation natten || echo "natten could not be installed: everything runs without it"
	touch $@

demo: $(VENV)/core  ## train both stages on handwritten digits, sample, evaluate (5 to 10 minutes on 2 CPU cores with bfloat16, about 15 without)
	$(RUN) train_vqgan.py
	$(RUN) train_sampler.py --sampler absorbing
	$(RUN) experiments/get_samples.py
	$(RUN) experiments/calc_FID.py
	$(RUN) experiments/check_digits.py

demo-ddpm: $(VENV)/core  ## the same with Gaussian diffusion in pixel space
	$(RUN) train_sampler.py --sampler ddpm
	$(RUN) experiments/get_samples.py --sampler ddpm --save_process
	$(RUN) experiments/calc_FID.py --sampler ddpm
	$(RUN) experiments/calc_approximate_ELBO.py --sampler ddpm
	$(RUN) experiments/check_digits.py --sampler ddpm

demo-layout: $(VENV)/core  ## train on drawn scenes with their layouts, sample, measure how well samples obey (15 minutes on 2 CPU cores with bfloat16)
	$(RUN) train_sampler.py --sampler ddpm --config configs/shapes_layout.yaml
	$(RUN) experiments/get_samples.py --config configs/shapes_layout.yaml --log_dir samples_layout
	$(RUN) experiments/calc_layout.py --samples logs/samples_layout/samples.npz --log_dir layout

demo-captions: $(VENV)/core  ## train on digits with captions, in pixels and on codes; measure whether samples show what captions say (15 minutes on 2 CPU cores with bfloat16)
	$(RUN) train_vqgan.py
	$(RUN) train_sampler.py --sampler ddpm --config configs/digits_captions.yaml
	$(RUN) train_sampler.py --sampler absorbing --config configs/digits_captions.yaml
	$(RUN) experiments/check_captions.py --load_dir ddpm_digits_captions
	$(RUN) experiments/check_captions.py --load_dir absorbing_digits_captions

app: $(VENV)/extra  ## serve a web page for the models of `make demo`: http://127.0.0.1:7860
	$(RUN) demo.py

test: $(VENV)/dev  ## run the test suite (under 8 minutes on 2 CPU cores)
	$(RUN) -m pytest

test-all: $(VENV)/dev  ## run all tests, including slow ones
	$(RUN) -m pytest -m ""

fuzz: $(VENV)/dev  ## throw 10,000 generated command lines, files and runs at the scripts (half an hour on 2 CPU cores)
	$(RUN) tests/fuzz

test-oldest: $(OLDEST)/ready  ## run the test suite with the oldest supported torch, in a separate environment
	$(OLDEST)/bin/python -m pytest

$(OLDEST)/ready: requirements.txt requirements-extra.txt requirements-dev.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --upgrade pip
	$(OLDEST)/bin/python -m pip install "torch==2.11.*" "torchvision==0.26.*" -r requirements-dev.txt
	touch $@

lint: $(VENV)/dev  ## check style and formatting with ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
