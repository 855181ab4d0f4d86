# `make pretrain` shows everything once; `make test` proves it. Both need Python 3.11 or newer, make, and nothing else.
#
# On a machine without a GPU, take torch's CPU build (smaller by gigabytes):
#     make pretrain EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
EXTRA_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
INDEX := $(if $(EXTRA_INDEX_URL),--extra-index-url $(EXTRA_INDEX_URL))

.PHONY: pretrain test test-slow soak quality style

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(INDEX) --constraint constraints.txt --editable ".[test]"
	touch $@

pretrain: $(VENV)/installed
	$(BIN)/python run_pretrain.py --output_dir runs/digits
	$(BIN)/python run_linear_probe.py --model_name_or_path runs/digits --output_dir runs/digits_probe
	@echo "weights and card: runs/digits; pictures: runs/digits/reconstructions.png; accuracy: the table above"

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

soak: $(VENV)/installed
	$(BIN)/python -m benchmarks.soak

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
