# make quickstart   set up .venv, install, and train four sites on real text
# make test         the tests           make check   format, lint, types
# make docs         docs/options.md and its schema      make package   a wheel, tried out
# make CPU=1 ...    torch's small build, as on any machine without an accelerator; CPU=0: never
# make docs-check   the README's first commands, in a fresh clone
# make compat       exported models on both majors of transformers
# make bench        speed of experts and steps, beside transformers (docs/performance.md)
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TOOLS := .venv/.installed-dev
CPU ?= auto
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPAT := tests/test_export.py tests/test_transformers.py

.PHONY: install quickstart test compat check format docs docs-check package bench clean

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fomoe needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	options=$$($(BIN)/python torchbuild.py '$(CPU)') && $(INSTALL) $$options -e .
	@touch $@

$(TOOLS): $(INSTALLED)
	$(INSTALL) -e '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/fomoe train configs/quickstart.yaml --next-free

test: $(TOOLS)
	$(BIN)/python -m pytest -n 2 --dist loadfile

compat: $(TOOLS) build/transformers-4/.installed
	PYTHONPATH=build/transformers-4 $(BIN)/python -m pytest $(COMPAT)
	$(INSTALL) --upgrade 'transformers>=5,<6'
	$(BIN)/python -m pytest $(COMPAT)

build/transformers-4/.installed: # beside the environment, which has the newest
	$(INSTALL) --no-deps --target $(@D) \
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

docs: $(INSTALLED)
	$(BIN)/fomoe options --write docs

docs-check: # takes the time of `make quickstart` and of two installations
	$(PYTHON) -m tests.try_readme

package: $(TOOLS)
	$(BIN)/python -m tests.try_package # --from-index: with what pip fetches

bench: $(INSTALLED)
	$(INSTALL) -e '.[transformers]'
	$(BIN)/python -m bench $(BENCH)

clean:
	rm -rf .venv build dist *.egg-info
