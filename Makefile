# Every target does its own set-up and is quick the second time. `make help` explains them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
RUST := $(shell find crates -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock
# What pytest is given, for instance: make test ARGS='tests/test_tidy.py -k skip'
ARGS ?=
# What the tour is given, for instance: make tour TOUR='--file big.npy'
TOUR ?=
# How long `make soak` goes on.
MINUTES ?= 120
# What `make older` does without: with none left out, which is the ordinary run, these are all pairs.
WITHOUT ?= continue_wp,poison wp_async,poison wp_async,continue_wp
# All combinations, and all of the engine's tests: for `make soak`.
WITHOUT_ALL := wp_async continue_wp poison $(WITHOUT) wp_async,continue_wp,poison
# What `make kernels` is given, for instance: make kernels KERNELS='6.12 --parts kills'
KERNELS ?=

.PHONY: help tour test older kernels bench lint docs soak clean
help: ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-7s %s\n", $$1, $$2}' Makefile

# Two stamps. .deps: the Python packages that pyproject.toml names. .ext: the compiled part. They are two so
# that a change in Rust rebuilds the extension and nothing else, and a fresh clone builds it once.
.venv/.deps: pyproject.toml tools/requirements.py tools/needs
	@tools/needs $(PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/python tools/requirements.py dev > .venv/requirements.txt
	$(BIN)/python -m pip install -q -r .venv/requirements.txt
	@touch $@

.venv/.ext: .venv/.deps $(RUST)
	@tools/needs $(PYTHON)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

.venv/.docs: .venv/.deps
	$(BIN)/python tools/requirements.py docs > .venv/requirements-docs.txt
	$(BIN)/python -m pip install -q -r .venv/requirements-docs.txt
	@touch $@

tour: .venv/.ext ## watch NumPy work on a file larger than memory, and points of changing memory
	$(BIN)/python -m userfault tour $(TOUR)

# The Python crate has no tests in Rust: what it does is tested from Python. Leaving it out also spares a
# second build of PyO3, which is compiled differently for an extension module. The second line builds the
# engine with umap's defects in it, to see that each of them is found.
test: .venv/.ext ## run every test, Rust's and then Python's
	cargo test --release --workspace --exclude userfault-python
	cargo test --release -p userfault-engine --features defects --test umap_defects --test halfway_copies --test flights
	$(MAKE) older
	$(BIN)/python -m pytest $(ARGS)

# The parts of paging that do the work of a missing feature.
OLDER_RUST := $(addprefix --test ,dirty_evidence lost_writes)
OLDER_PYTHON := $(addprefix tests/face/test_,private.py io_errors.py)
# Messages in place of the kernel's own notes take time: so do the tests' limits.
older: export USERFAULT_TIME_SCALE ?= 2
older: .venv/.ext ## the tests of paging without what newer kernels have
	set -e; for without in $(WITHOUT); do echo "without $$without"; export USERFAULT_WITHOUT=$$without; \
	    cargo test --release -q -p userfault-engine $(OLDER_RUST); $(BIN)/python -m pytest -q $(OLDER_PYTHON); done

kernels: .venv/.ext ## tests under Debian's 6.1 and 6.12 in QEMU
	@$(BIN)/python -m tools.kernels $(KERNELS)

bench: .venv/.ext ## measure against floors and rivals; writes docs/reference/performance.md
	$(BIN)/python -m benches $(ARGS)

lint: .venv/.ext ## ruff, mypy, stubtest, rustfmt, clippy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest userfault._native
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --features userfault-engine/defects -- -D warnings

docs: .venv/.ext .venv/.docs ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

soak: .venv/.ext ## the tests that want hours, with clean blocks hashed: make soak MINUTES=480
	USERFAULT_DEBUG=hash USERFAULT_SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -m soak $(ARGS)
	USERFAULT_DEBUG=hash $(MAKE) older WITHOUT='$(WITHOUT_ALL)' OLDER_RUST= OLDER_PYTHON=tests/face

clean: ## remove everything that was built
	rm -rf .venv target docs/_build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benches -name __pycache__ -prune -exec rm -rf {} +
	rm -f src/userfault/_native*.so
