# make demo: set up, run the whole road on the embedded model, leave a run folder.  make test: set up, test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test faults soak test-all server-env lint docs smoke clean audit coverage mutants

setup: $(STAMP)

# torch comes first and by its pinned version: a loose request would fetch gigabytes of GPU packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/cai run examples/quickstart.yaml
	@echo "Open runs/quickstart/report.html; beside it are the rows of every stage, sl-cai, pm, rl-cai, and their manifests."

# One thread a worker: two torch processes that each want both cores slow each other tenfold.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Everything that can happen to a long run, done to it for real; the last line is `N passed, N failed`.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist load -m '' tests/faults

# Half an hour against a server of which one answer in a hundred fails.
soak: setup
	CAI_SOAK_SECONDS=1800 $(BIN)/pytest -m '' tests/faults/test_soak.py

# The real server of `pytest -m server`; compiling it takes some minutes, once.
server-env: .server-venv/.installed

.server-venv/.installed: tests/server_env.py tests/server_requirements.txt | $(STAMP)
	$(BIN)/python tests/server_env.py
	touch $@

test-all: setup server-env
	$(BIN)/pytest -m ''

smoke: setup
	$(BIN)/cai run tests/smoke.yaml --out runs/smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive cai_cli

# Known vulnerabilities of what constraints.txt pins. Says so loudly where no service can be asked.
audit: setup
	$(BIN)/python tests/audit.py

# Lines that `make test` runs, in the processes it starts too; fails under the share in pyproject.toml.
coverage: setup
	rm -rf runs/coverage && mkdir -p runs/coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Mutants of what reads rows, builds prompts and makes labels (pyproject.toml); the survivors are listed at the end.
# Their engine has packages of its own, which are kept out of the environment. It goes on where it stopped.
mutants: setup .mutants-env
	-PYTHONPATH=.mutants-env OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 2
	PYTHONPATH=.mutants-env $(BIN)/python -m mutmut results

.mutants-env:
	$(BIN)/pip install --quiet --target $@ mutmut==3.8.1

docs: setup
	$(BIN)/python tests/cli_docs.py > docs/cli.md

clean:
	rm -rf $(VENV) .server-venv .mutants-env mutants runs
