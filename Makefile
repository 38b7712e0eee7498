# Two commands matter: `make serve` and `make test`. Both set up what this machine needs first; when nothing changed that is instant.
PYTHON  ?= python3
MACHINE := $(if $(wildcard /proc/driver/nvidia/version),cuda,cpu)
BIN     := .venv/bin
READY   := .venv/.ready-$(MACHINE)
TOOLS   := .venv/.tools
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Where pip finds a CPU build of torch, if not by itself: make TORCH_INDEX=URL ... (install.md says which)
TORCH_INDEX ?=
ANSWERS := model_configs/cpu_1_gpu_3_model.json
FILE    ?= $(ANSWERS)
# More for `chimera serve`: make serve ARGS="--port 8001"
ARGS    ?=
MODELS  := .models

.PHONY: serve test test-all bench models test-sglang-matrix install help clean

help:                ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

serve: $(READY) $(if $(filter-out $(ANSWERS),$(filter model_configs/cpu_%,$(FILE))),$(MODELS)/.made) ## start the server on FILE (default: three small models that answer, no GPU needed)
	@$(BIN)/chimera serve $(FILE) $(ARGS)

test: $(TOOLS)       ## linter, types and quick tests
	@echo "test: ruff, mypy, quick tests"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/pytest

test-all: $(TOOLS)   ## the slow tests too: real engines, killed processes
	@echo "test-all: slow tests"
	@$(BIN)/pytest -m slow

bench: $(READY) $(MODELS)/.made ## four policies and two kinds of memory on real engines: a table and a report (10 minutes)
	@$(BIN)/python benchmark/suite.py --out bench-results/suite --json bench-results/suite.json

models: $(MODELS)/.made ## the random tiny models that the other model_configs/cpu_*.json name

# The oldest, the pinned and the newest SGLang that `engine/sglang/versions.py` allows, over the same other packages.
RELEASES := 0.5.16 0.5.20 0.5.23
SMOKE    := tests/engine/allocator_cases.py tests/engine/test_sglang.py tests/engine/test_elastic.py tests/engine/test_gang.py

test-sglang-matrix: $(TOOLS) $(RELEASES:%=.sglang/%) ## the engine's smoke suite on each supported release of SGLang
	@for release in $(RELEASES); do echo "test-sglang-matrix: SGLang $$release"; \
	  PYTHONPATH=.sglang/$$release $(BIN)/pytest -m slow $(SMOKE) -k "$(or $(K),not greedy_answers or greedy_answers and llama)" || exit 1; done

.sglang/%: $(READY)
	@$(PIP) --no-deps --target $@ sglang==$*

install: $(READY)    ## only set up .venv

clean:               ## forget .venv and the tiny models
	rm -rf .venv .sglang $(MODELS)

$(READY): requirements/$(MACHINE).txt pyproject.toml
	@echo "set-up: installing the $(MACHINE) packages into .venv (once; 1.7 GB on a CPU)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) $(if $(filter cpu,$(MACHINE)),--no-deps) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/$(MACHINE).txt
	@$(BIN)/python -c "import torch" || { echo "set-up: pip found no CPU build of torch: make TORCH_INDEX=URL install (install.md, A machine without a GPU)"; exit 1; }
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(TOOLS): $(READY) requirements/dev.txt
	@echo "set-up: installing what checks the package into .venv (once; 0.6 GB)"
	@$(PIP) --no-deps -r requirements/dev.txt
	@touch $@

$(MODELS)/.made: $(READY) $(wildcard python/chimera/tiny/*.py)
	@$(BIN)/chimera models make $(MODELS)
	@touch $@
