# Needs python3 (3.10 or newer), make and git; everything else goes into .venv once, and later runs need no network.
#   make demo   attack a trained CT segmentation model, write a report
#   make test   all checks and tests, as the continuous integration runs them
# Variations: make demo PYTHON=python3.12 PIP_ARGS='--index-url ...' DEMO_ARGS='--help' ; make pytest PYTEST_ARGS='-k pgd'

PYTHON ?= $(shell command -v python3.11 || echo python3)
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check format types pytest clean

demo: $(INSTALLED)
	$(BIN)/medrobust demo $(DEMO_ARGS)

test: check pytest

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory types

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Type checkers do not follow the mapping of attacks/ to medrobust.attacks, so they read an installed copy.
types: $(INSTALLED)
	@rm -rf build
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../setup.cfg --cache-dir ../../.mypy_cache -p medrobust

pytest: $(INSTALLED)
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf build dist medrobust.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage htmlcov
