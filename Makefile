# make quickstart   set up .venv, install, and train four sites on real text
# make test         the tests           make check   format, lint, types
# make compat       exported models on both majors of transformers
# make bench        speed of experts and steps, beside transformers (docs/performance.md)
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TOOLS := .venv/.installed-dev
COMPAT := tests/test_export.py tests/test_transformers.py

.PHONY: install quickstart test compat check format bench clean

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fomoe needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(TOOLS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/fomoe train configs/quickstart.yaml --next-free

test: $(TOOLS)
	$(BIN)/python -m pytest

compat: $(TOOLS) build/transformers-4/.installed
	PYTHONPATH=build/transformers-4 $(BIN)/python -m pytest $(COMPAT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'transformers>=5,<6'
	$(BIN)/python -m pytest $(COMPAT)

build/transformers-4/.installed: # beside the environment, which has the newest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) \
	  'transformers==4.57.*' 'huggingface_hub>=0.34,<1' 'tokenizers>=0.22,<0.23' hf-xet
	@touch $@

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p build/types && ln -sfn ../../sim build/types/fomoe_sim # its import name, for mypy
	MYPYPATH=build/types $(BIN)/mypy -p fomoe -p fomoe_sim

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[transformers]'
	$(BIN)/python -m bench $(BENCH)

clean:
	rm -rf .venv build *.egg-info
