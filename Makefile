# `make pretrain` shows everything once; `make test` proves it. Both need Python 3.11 or newer, make, and nothing else.
#
# On a machine without a GPU, take torch's CPU build (smaller by gigabytes):
#     make pretrain EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
EXTRA_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
INDEX := $(if $(EXTRA_INDEX_URL),--extra-index-url $(EXTRA_INDEX_URL))

VERSIONS := 5.4.0 5.24.0# of transformers: the oldest that pyproject.toml allows, and the newest that was tried

.PHONY: pretrain test test-slow test-page test-versions docs publish soak gpu quality style

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(INDEX) --constraint constraints.txt --editable ".[test]"
	touch $@

pretrain: $(VENV)/installed
	$(BIN)/umae pretrain --output_dir runs/digits
	$(BIN)/umae probe --model_name_or_path runs/digits --output_dir runs/digits_probe
	@echo "weights and card: runs/digits; images: runs/digits/reconstructions.png; accuracy: the table above"

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" --numprocesses 3 --dist worksteal --durations 25

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile thorough

# In an environment of its own, since gradio needs an older Pillow than the one in constraints.txt
.venv-page/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep '^torch==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(INDEX) --constraint $(@D)/constraints.txt \
		--editable ".[test,demo]" ipykernel nbclient playwright
	touch $@

# The page of `umae demo` and those of reports and studies in Chromium, and the notebook
test-page: .venv-page/installed
	.venv-page/bin/python -m pytest -m slow tests/demo tests/sharing tests/test_examples.py

.venv-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep '^torch==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(INDEX) --constraint $(@D)/constraints.txt \
		--editable ".[test]" transformers==$*
	touch $@

# The model under both, transformers' own tests of it, and what either has saved under the other
test-versions: $(VERSIONS:%=.venv-%/installed)
	for version in $(VERSIONS); do \
		.venv-$$version/bin/python -m pytest tests/test_configuration.py tests/test_modeling.py tests/test_golden.py \
			tests/test_loading.py tests/test_transformers.py && \
		PYTHONPATH=. .venv-$$version/bin/python tests/versions.py save .venv-$$version/saved || exit 1; \
	done
	for saved in $(VERSIONS); do for version in $(VERSIONS); do \
		PYTHONPATH=. .venv-$$version/bin/python tests/versions.py load .venv-$$saved/saved || exit 1; \
	done; done

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(INDEX) --constraint constraints.txt --editable ".[docs]"
	touch $@

# The pages of docs/ in site/; a broken link, a warning (which --quiet would hide from --strict) or a file that a reader's
# browser would fetch fails
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rE '<(script|link|img)[^>]*(src|href)="?https?:' --include='*.html' site

# The models in weights/ and a collection of them; HUB is a user or an organisation on the Hub. Log in first: hf auth login
publish: $(VENV)/installed
	$(BIN)/python weights/publish.py $(HUB)

soak: $(VENV)/installed
	$(BIN)/python -m benchmarks.soak

# Everything that has to be known of a GPU; again for what did not fit into the time
gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
