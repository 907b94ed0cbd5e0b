# The two commands are `make demo` and `make test`; `make help` lists the rest.

PYTHON := .venv/bin/python
CHECKED := vmrt tests bench demo
# Options for the end-to-end run, e.g. E2E_OPTIONS="-n 2" or E2E_OPTIONS="-k network -x".
E2E_OPTIONS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup guest-tuned stubs demo test check lint types unit contract e2e interop bench format clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install what is missing: Debian packages, .venv, stubs, vsock device, guest image
	@setup/setup.sh

guest-tuned: setup ## compile the tuned guest kernel (minutes, once); later guest images take it
	@setup/setup.sh tuned

stubs: ## generate the protobuf modules only
	@setup/setup.sh stubs

demo: setup ## set up, then run one pod with two containers and show every step
	@$(PYTHON) demo/run.py

test: setup check contract e2e interop ## set up, then run every test: what CI runs

check: lint types unit ## lint, types and unit tests: no root, no VM, under a minute

lint:
	$(PYTHON) -m ruff check $(CHECKED)
	$(PYTHON) -m ruff format --check $(CHECKED)

types:
	$(PYTHON) -m mypy

unit:
	$(PYTHON) -m pytest -q tests/unit

contract: ## hold the drivers and their fakes to one contract
	@# A file a process: libvirt registers its drivers anew each time it is opened, and takes 20 of them or so.
	for file in tests/contract/test_*.py; do $(PYTHON) -m pytest -q $$file || exit; done

e2e: ## end-to-end tests with real VMs, CNI plugins and a registry (root)
	$(PYTHON) -m pytest -v --timeout 600 $(E2E_OPTIONS) tests/e2e

interop: ## the clients of kubelet and kubectl, in Go
	@$(PYTHON) -m tests.interop

bench: setup ## measure against bare QEMU and print the figures of docs/performance.md
	@$(PYTHON) -m bench

format: ## let ruff rewrite what it can
	$(PYTHON) -m ruff check --fix $(CHECKED)
	$(PYTHON) -m ruff format $(CHECKED)

clean: ## remove what set-up and tests made in this checkout (not Debian packages, not pods)
	-rm -rf "$$(readlink -f .cache/guest)"
	rm -rf .venv .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf vmrt/proto vmrt/agent/agent_pb2.py vmrt/agent/agent_pb2.pyi
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
