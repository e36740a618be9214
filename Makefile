# Everything a person does here starts with make; `make` alone lists what there is.
# PYTHON chooses the interpreter (3.11 or later), ARGS goes to the tool that a target runs.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
ARGS ?=
export VENV PYTHON

PY := $(VENV)/bin/python

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: setup ## boot the six VMs of an infra.conf on three test hosts of this machine, then take them down
	$(PY) -m deploy.demo $(ARGS)

# Two at a time: one process mostly waits for test hosts while the other computes (tests/sharing.py).
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test
test: setup ## run all tests: unit, sim, net and e2e (root makes the test hosts; ARGS="-k push" picks, ARGS="-n 0" one at a time)
	$(PY) -m pytest $(TWO) $(ARGS)

.PHONY: test-unit
test-unit: venv ## run the quick tests: no root, no network, no processes
	$(PY) -m pytest $(TWO) $(wildcard tests/unit tests/sim) $(ARGS)

.PHONY: sim
sim: venv ## play 10,000 seeded schedules of faults on simulated trees (ARGS="--schedules 100 --first 7")
	$(PY) -m tests.sim $(ARGS)

.PHONY: sim-mutants
sim-mutants: venv ## plant faults in protocol/, one at a time, and see that the simulator finds each (ARGS="--only cancel")
	$(PY) -m tests.sim.mutants $(ARGS)

.PHONY: fuzz
fuzz: venv ## hostile bytes for all that reads what others wrote, 10 minutes (ARGS="--minutes 1 --only infra")
	$(PY) -m tests.fuzz $(ARGS)

.PHONY: fuzz-guided
fuzz-guided: venv ## the same guided by what code they reach, a minute each, on x86-64 (ARGS="--seconds 600 --only codec")
	$(PY) -m pip -qq --disable-pip-version-check --no-input install --require-hashes --only-binary :all: \
		-r deploy/lock/fuzz.txt
	$(PY) -m tests.fuzz.guided $(ARGS)

.PHONY: bench-vms
bench-vms: setup ## 2,000 VMs on 64 agents with libvirt's test driver: spawned, lost, spawned again, destroyed; the seconds
	$(PY) -m tests.bench.vms $(ARGS)

.PHONY: check
check: venv ## lint, formatting, strict types (3.11, and 3.10 for agent and protocol), layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --diff .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --python-version 3.10 protocol agent
	$(VENV)/bin/lint-imports
	$(VENV)/bin/shellcheck .ci/run $$(git ls-files '*.sh')

.PHONY: format
format: venv ## put the code into its format and make the fixes that are safe
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: man
man: venv ## write ctl's manual page, from its --help, to build/ctl.1
	@mkdir -p build
	$(PY) -m controller.ctl.manual > build/ctl.1

.PHONY: bench-broadcast
bench-broadcast: setup-bench ## compare ctl broadcast with pdsh, clush and TakTuk (root; ARGS="--hosts 64 --only true,race,seq,flood,slow,clients")
	$(PY) -m tests.bench.broadcast $(ARGS)

.PHONY: bench-push
bench-push: setup-bench ## compare ctl push with TakTuk, clush and scp on test hosts (root; ARGS="--only shaped --hosts 8")
	$(PY) -m tests.bench.push $(ARGS)

.PHONY: soak
soak: setup ## broadcast without end under random faults on 32 test hosts, 10 minutes (root; ARGS="--minutes 3 --seed 1")
	$(PY) -m tests.bench.soak $(ARGS)

.PHONY: testhosts
testhosts: setup ## make test hosts and keep them until Ctrl-C (root; ARGS="-n 8", ARGS=--help)
	$(PY) -m deploy.testhosts up $(ARGS)

.PHONY: setup
setup: ## install what the above need: system packages (as root, with apt-get) and .venv
	@deploy/setup.sh

.PHONY: setup-bench
setup-bench: ## the same, and the tools that the benchmarks compare with
	@deploy/setup.sh bench

.PHONY: venv
venv: ## install the locked Python packages alone
	@deploy/setup.sh venv

.PHONY: lock
lock: ## write the locked requirements anew from pyproject.toml (ARGS=--upgrade for the newest versions)
	@deploy/lock/lock.sh $(ARGS)

.PHONY: lock-agent
lock-agent: venv ## write the lock of the wheels that hosts get anew, from the pins in deploy/lock_agent_wheels.py
	$(PY) deploy/lock_agent_wheels.py

.PHONY: clean
clean: ## remove .venv and everything else that these targets made here
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .fuzz
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
