# Two commands need nothing but Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help demo test coverage test-qemu test-kvm test-xen lint format spec bench bench-quick fuzz clean

help:
	@echo "make demo         a look at a real stream and a live migration; leaves files in build/demo"
	@echo "make test         the test suite"
	@echo "make test-qemu    real QEMU machines, migrated (Debian; as root it installs QEMU, gcc and busybox: minutes)"
	@echo "make test-kvm     a guest of KVM, migrated; where there is no /dev/kvm, in an emulated machine that has it"
	@echo "make test-xen     real xl restore, under emulation, on streams that we wrote (by hand: 10 minutes, root, Debian)"
	@echo "make coverage     branch coverage of the streaming floors by vectors and properties alone; 95 % at least"
	@echo "make lint         ruff check, ruff format --check, mypy --strict"
	@echo "make bench        the ratios of the README, on streams that it makes (needs 14 GB of disk, 16 GB of memory)"
	@echo "make bench-quick  the same on small streams: does it run, not how fast"
	@echo "make fuzz         every fuzz target on mutated vectors, a minute in all; any error but our own is a finding"
	@echo "make spec         regenerate the tables of spec/"
	@echo "make format       let ruff format and mend"
	@echo "make clean        remove what these commands made"

# Installed once, and again when pyproject.toml changes. Compiled ahead, so that start-up is that of an
# installed package even where the environment keeps Python from writing bytecode.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "migstream needs Python 3.11 or later; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 cannot make a venv here; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,lint,fuzz]'
	@touch $@

demo: $(READY)
	@$(BIN)/python -m compileall -q migstream
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh demo/demo.sh build/demo

test: $(READY)
	$(BIN)/python -m pytest -q -n auto

test-qemu: $(READY)
	$(BIN)/python -m tests.qemu.image
	$(BIN)/python -m pytest -q tests/qemu --qemu

test-kvm: $(READY)
	$(BIN)/python -m tests.kvm

# The floors that read what others wrote, by the conformance vectors and the property tests alone: a branch that
# neither reaches is one that no vector or property tells anybody about. The seed makes the figure the same each time.
PROPERTIES := tests/test_vectors.py $(wildcard tests/test_*_properties.py) \
              tests/test_inputs.py::test_any_mix_of_calls_gives_the_octets_in_order

coverage: $(READY)
	$(BIN)/python -m pytest -q -n 2 --hypothesis-seed=0 $(PROPERTIES) \
	  --cov --cov-report=term-missing:skip-covered --cov-report=json:build/coverage.json
	@$(BIN)/python -m tests.branches build/coverage.json

test-xen: $(READY)
	$(BIN)/python -m tests.xen

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

spec: $(READY)
	$(BIN)/python -m spec.generate

bench: $(READY)
	@$(BIN)/python -m compileall -q migstream
	$(BIN)/python -m bench

bench-quick: $(READY)
	$(BIN)/python -m bench --quick

fuzz: $(READY)
	$(BIN)/python -m fuzz --seconds 60

clean:
	rm -rf $(VENV) build dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
