# Everything a contributor runs. `make` alone prints this list.
#
# Without LLAMAC_PYTHON the first target that needs Python makes .venv/ and installs llamac into it.
# LLAMAC_EXTRAS=compiler,dev,qnn adds Qualcomm's compiler for HTP, under Qualcomm's licence.
# With LLAMAC_PYTHON=/path/to/python that interpreter is used as it is (llamac[compiler,dev] installed).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

ifdef LLAMAC_PYTHON
PYTHON := $(shell command -v $(LLAMAC_PYTHON))
INSTALLED :=
else
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
endif
LLAMAC_EXTRAS ?= compiler,dev,farm
LLAMAC := $(dir $(PYTHON))llamac

# What `make devices` fetches; tests look here.
export LLAMAC_DEVICES ?= $(abspath build/devices)

# Processes that share the tests; each takes up to 1 GB. Files stay whole, for they share bundles.
JOBS ?= 2
PYTEST = -m pytest -q -n $(JOBS) --dist loadfile

DEMO_MODEL := examples/tiny-llama/spinquant
DEMO_BUNDLE := bundles/tiny-llama-host
DEMO_PROMPT := Tell me a story about a fox.

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(LLAMAC_EXTRAS)]'
	touch $@

.PHONY: install
install: $(INSTALLED) ## Make .venv/ and install llamac into it (the others do this by themselves)

.PHONY: demo
demo: $(INSTALLED) ## Compile the tiny model for this machine and print text, every step visible
	$(LLAMAC) compile $(DEMO_MODEL) --target host -o $(DEMO_BUNDLE) --force
	$(LLAMAC) inspect $(DEMO_BUNDLE)
	$(LLAMAC) run $(DEMO_BUNDLE) "$(DEMO_PROMPT)" --max-tokens 200

.PHONY: devices
devices: $(INSTALLED) ## Fetch what tests of Arm CPUs run on (arm64 Python, a QEMU with SME)
	$(PYTHON) -m llamac.tools.device_roots --output "$(LLAMAC_DEVICES)"

.PHONY: test
test: $(INSTALLED) ## Run the fast tests
	$(PYTHON) $(PYTEST) -m "not slow"

.PHONY: test-all
test-all: $(INSTALLED) ## Run all tests, the slow ones too
	$(PYTHON) $(PYTEST)

# What a wheel can lack are files and entry points: these tests use all of them. `make test` has the rest.
WHEEL_TESTS := tests/e2e tests/tools tests/runtime tests/targets/test_registry.py

.PHONY: test-wheel
test-wheel: wheel ## Run tests of commands and bundles against the installed wheel, outside the checkout
	rm -rf build/test-wheel && mkdir -p build/test-wheel
	$(PYTHON) -m pip install --quiet --no-deps --target build/test-wheel/site dist/llamac-*.whl
	cp -r tests examples pyproject.toml build/test-wheel/
	cd build/test-wheel && PYTHONPATH=site $(abspath $(PYTHON)) $(PYTEST) -o pythonpath= -m "not slow" $(WHEEL_TESTS)

.PHONY: check
check: $(INSTALLED) ## Check format, lint and types
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m mypy

.PHONY: wheel
wheel: $(INSTALLED) ## Build the sdist, and the wheel from it, into dist/
	rm -rf dist build/lib build/bdist.*
	$(PYTHON) -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	$(PYTHON) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/llamac-*.tar.gz

.PHONY: clean
clean: ## Remove what the other targets made
	rm -rf .venv build dist bundles .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
