# Every target does its own set-up; `make help` explains them.
SHELL := /bin/bash
PY := .venv/bin/python
RUST := $(shell find crates -name '*.rs' -o -name Cargo.toml) Cargo.toml

.PHONY: help test
help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

.venv/.deps: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[dev]'
	touch .venv/.deps .venv/.ext

.venv/.ext: .venv/.deps $(RUST)
	.venv/bin/pip install -q --no-build-isolation --no-deps -e .
	touch .venv/.ext

test: .venv/.ext ## run every test
	cargo test --release --workspace
	$(PY) -m pytest
