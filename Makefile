# Two commands matter to a new user: `make quickstart` and `make test`. Both set the environment up first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests never reach a hub; the number of workers follows the machine.
JOBS   ?= 2

.PHONY: setup quickstart test lint test-oldest test-gpu soak clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

quickstart: setup
	$(BIN)/pronghorn quickstart

test: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lower bounds of pyproject.toml, in an environment of their own; all tests, or those of TESTS.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.13.0
	.venv-oldest/bin/python -m pip install --quiet -e '.[dev]' transformers==5.17.0 trl==1.15.0 peft==0.21.0 \
		bitsandbytes==0.50.0 datasets==4.7.0
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

test-gpu:
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest tests/gpu

# Every test marked slow (kills and SIGTERMs again and again, all kernels under all losses, 500 steps' memory), then
# twice 1,000 steps whose memory must be flat: plain, and with threads and worker processes beside the training.
# A model on a GPU: python -m benchmarks.soak --model FOLDER --steps 200
soak: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --steps 1000 --length 12
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --steps 1000 --length 12 --everything

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
