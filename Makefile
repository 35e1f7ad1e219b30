# Every target works in the virtual environment that `make setup` makes; VENV=... names another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest Python that pyproject.toml allows, for `make test-oldest`.
OLDEST_PYTHON ?= python3.10
# Extra arguments of a script: make toy ARGS="--steps 50"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup test test-all test-oldest typecheck lint format toy mnist fashion captioned text vae policy bench bench-peer bench-mmdit bench-untied bench-fragmentation gpu wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make the environment and install the tested versions into it
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"

test: ## the fast tests
	$(BIN)/python -m pytest

test-all: ## the slow tests too
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m slow -n 0

test-oldest: ## the fast tests with the oldest versions that pyproject.toml allows, in an environment of their own
	$(OLDEST_PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install -c constraints-oldest.txt -e ".[test,adapters]" tensorboard
	build/oldest/bin/python -m pytest

typecheck: ## the fast tests with every shape checked at run time
	TYPECHECK=1 $(BIN)/python -m pytest

lint: ## style, format and static types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

toy: ## train on the toy data
	$(BIN)/python train_toy.py $(ARGS)

mnist: ## train on handwritten digits
	$(BIN)/python train_mnist.py $(ARGS)

fashion: ## train on Fashion-MNIST
	$(BIN)/python train_mnist.py --dataset fashion $(ARGS)

captioned: ## train on images with captions: make captioned ARGS="--data FOLDER"
	$(BIN)/python train_captioned_images.py $(ARGS)

text: ## train on text alone
	$(BIN)/python train_text_only.py $(ARGS)

vae: ## train an autoencoder of images
	$(BIN)/python train_vae.py $(ARGS)

policy: ## learn to push a T from demonstrations
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[policy]"
	$(BIN)/python train_policy.py $(ARGS)

bench: bench-peer ## time generation and training beside the package on PyPI: make bench ARGS="--rounds 3"
	$(BIN)/python benchmarks/generation.py --peer build/peer/bin/python $(ARGS)
	$(BIN)/python benchmarks/training.py --peer build/peer/bin/python --bf16 $(ARGS)

bench-peer: ## the environment of that package
	$(PYTHON) -m venv build/peer
	build/peer/bin/python -m pip install -c constraints.txt transfusion-pytorch==0.20.0

bench-mmdit: ## time MMDiT beside the package mmdit on PyPI and diffusers, in an environment of their own
	$(PYTHON) -m venv build/mmdit
	build/mmdit/bin/python -m pip install -c constraints.txt -e . mmdit==0.3.0 diffusers==0.42.1
	build/mmdit/bin/python benchmarks/mmdit_training.py $(ARGS)

bench-untied: ## time a training step with untied weights beside one with tied weights
	$(BIN)/python benchmarks/untied.py $(ARGS)

bench-fragmentation: ## time decode steps of rows that lie apart in the cache beside those of neighbours
	$(BIN)/python benchmarks/fragmentation.py $(ARGS)

gpu: ## on a GPU: equal results, no waits, throughput of training, in 8 minutes: make gpu ARGS="--minutes 5"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

wheel: ## build the wheel, install it into a fresh environment, import it there
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/check
	build/check/bin/python -m pip install -c constraints.txt dist/*.whl
	build/check/bin/python .ci/wheel.py dist/*.whl

clean: ## remove what can be made again (not results/)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
