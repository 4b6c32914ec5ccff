# Everything sets itself up: only Python 3.10+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test test-engines test-gptqmodel soak lint format demo-checkpoint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the constraint decides its build before another package can ask for a newer one.
$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.base  ## convert the demo checkpoint to int4 and print what it cost
	$(BIN)/qconvert demo

test: $(VENV)/.dev  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

test-engines: $(VENV)/.dev  ## slow tests: converted checkpoints in real inference engines
	PYTHON=$(PYTHON) bash tests/engines/setup.sh
	$(BIN)/python -m pytest -m engines tests/engines

test-gptqmodel: $(VENV)/.dev  ## GPTQ and AWQ in transformers; makes an environment of 6 GB
	PYTHON=$(PYTHON) bash tests/engines/setup_gptqmodel.sh
	$(BIN)/python -m pytest -m gptqmodel tests/engines

soak: $(VENV)/.dev  ## kill conversions two hundred times and compare what comes out
	QCONVERT_KILLS=200 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_resume.py -k killed

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff format everything
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-checkpoint: $(VENV)/.dev  ## train the demo checkpoint anew: about an hour on two cores
	$(BIN)/python -m calibration.demo

clean:  ## remove environments and outputs
	rm -rf $(VENV) .venv-vllm .venv-genai .venv-gptqmodel .ort-gpu demo-output
