# Every target works in a fresh clone: `setup` builds .venv and costs about a second when that is done.
PYTHON ?= python3
VENV := .venv/bin
TEST_SECONDS ?= 4500
# Threads that wait for each other sleep instead of spinning: on a machine shared with others, calibration of the
# small model took a fifth of the time (23 s against 124 s, two cores, load 7).
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:
	@echo "make setup   build .venv: torch, vLLM (CPU, or CUDA where nvidia-smi works) and this package"
	@echo "make demo    calibrate the tiny model, serve it with vLLM, ask about two images"
	@echo "make test    lint, then every test that this machine can run"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the files"
	@echo "make bench   kernel measurements (docs/serving.md has those of serving)"

setup:
	@$(PYTHON) scripts/setup_env.py

demo: setup
	@$(VENV)/python -m examples.demo.run

test: lint
	@timeout --signal=INT --kill-after=60 $(TEST_SECONDS) $(VENV)/python -m pytest

lint: setup
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

format: setup
	@$(VENV)/ruff check --fix .
	@$(VENV)/ruff format .

bench: setup
	@$(VENV)/vlmq bench kernels

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
