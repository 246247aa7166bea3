# Everything a person or CI types. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Stages run in the order written; cargo uses the cores.
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help

stage := @scripts/stage
# Tools that `cargo install` put there are found even where the shell does not look.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin
shell_scripts = $(shell git ls-files -co --exclude-standard scripts .ci tests/lab packaging/scripts | xargs -r grep -lE '^\#!.*\b(ba)?sh\b')

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install what building, tests and the demo need
	$(stage) setup scripts/setup

.PHONY: demo
demo: ## Start the three agents here, boot a first cloud, prove it
	$(stage) setup scripts/setup build demo
	$(stage) demo scripts/demo up

.PHONY: demo-down
demo-down: ## End the demo and remove all it made
	@scripts/demo down

.PHONY: test
test: setup lint build ## Check and test everything, as CI does
	$(stage) "doc tests" cargo test --locked --quiet --workspace --doc
	$(stage) tests cargo nextest run --locked --workspace --profile ci

# Tests start the programs that stand beside them, and build none.
.PHONY: build
build: ## Build the programs and tests, unoptimised
	$(stage) build cargo build --locked --workspace --all-targets
	$(stage) fuzzers scripts/fuzz build

.PHONY: test-fast
test-fast: ## Unit and property tests alone: no broker, no guest, no root
	$(stage) "fast tests" cargo nextest run --locked --workspace --profile fast

.PHONY: test-slow
test-slow: ## The tests that boot machines or break brokers
	$(stage) setup scripts/setup
	@$(MAKE) build
	$(stage) "slow tests" cargo nextest run --locked --workspace --profile slow

.PHONY: lint
lint: ## Format, shell scripts, clippy, rustdoc, dependencies
	$(stage) format cargo fmt --all --check
	$(stage) shellcheck shellcheck --external-sources $(shell_scripts)
	$(stage) clippy cargo clippy --locked --workspace --all-targets -- -D warnings
	$(stage) rustdoc env RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --locked --quiet --workspace --no-deps --document-private-items
	$(stage) dependencies cargo deny --locked --log-level error check --hide-inclusion-graph licenses bans sources

.PHONY: advisories
advisories: ## Ask the RustSec database about our dependencies (needs a network)
	$(stage) advisories cargo deny --locked check advisories

.PHONY: bench
bench: ## Measure speed and memory against the bars, printed as a table
	$(stage) setup scripts/setup
	$(stage) "release build" cargo build --locked --release --workspace --bins
	$(stage) bench cargo run --locked --release --package stackhand-bench

.PHONY: reference
reference: ## Write docs/reference anew from the programs
	$(stage) "agentctl" cargo build --locked --bin agentctl
	$(stage) reference env STACKHAND_REFERENCE=write cargo nextest run --locked --package stackhand-tests --test reference

.PHONY: two-nodes
two-nodes: ## A cloud of two machines from packages, to their purge (some 15 minutes)
	$(stage) setup scripts/setup build packages lab
	$(stage) build cargo build --locked --workspace --bins
	$(stage) packages scripts/packages --unoptimised
	$(stage) two-nodes tests/lab/two-nodes target/packages-unoptimised

.PHONY: packages
packages: ## Build .deb and .rpm packages into target/packages
	$(stage) setup scripts/setup build packages lab
	$(stage) packages scripts/packages
