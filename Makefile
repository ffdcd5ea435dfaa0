# make demo: install, run the whole pipeline on the embedded model and write a run folder.  make test: install, test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test faults slow soak test-all server-env vllm-env lint docs smoke clean audit coverage mutants

setup: $(STAMP)

# torch is installed first, by its pinned version. On Linux PyPI serves the build with CUDA, of some gigabytes; set
# PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to take the CPU build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/cai run examples/quickstart.yaml
	@echo "Open runs/quickstart/report.html. The same folder holds the rows of every stage, the models sl-cai, pm and rl-cai, and their manifests."

# One thread a worker: two torch processes that each use both cores slow each other down tenfold.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Fault injection: SIGKILL, full and read-only disks, torn files, signals, broken models; prints `N passed, N failed`.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist load -m '' tests/faults

# All that `make test` leaves out, faults too. A module whose tests share a server or a browser stays in one worker. vLLM
# comes last and alone: it takes both cores, and memory for its cache.
slow: setup server-env vllm-env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m '(slow or server or browser or faults) and not vllm'
	$(BIN)/pytest -m vllm

# Half an hour against a server that fails one request in a hundred.
soak: setup
	CAI_SOAK_SECONDS=1800 $(BIN)/pytest -m '' tests/faults/test_soak.py

# The model server and inspect-ai, which `pytest -m server` uses; the server is compiled once, which takes some minutes.
server-env: .server-venv/.installed

.server-venv/.compiled: tests/server_env.py tests/llama_only.cmake tests/server_requirements.txt
	$(PYTHON) tests/server_env.py compile
	touch $@

.server-venv/.installed: .server-venv/.compiled | $(STAMP)
	$(BIN)/python tests/server_env.py model
	touch $@

# vLLM's CPU build and cai, in an environment of their own (4 GB), for `pytest -m vllm`.
vllm-env: .vllm-venv/.installed

.vllm-venv/.installed: tests/vllm_env.py tests/vllm_requirements.txt
	$(PYTHON) tests/vllm_env.py
	touch $@

test-all: setup server-env vllm-env
	$(BIN)/pytest -m ''

smoke: setup
	$(BIN)/cai run tests/smoke.yaml --out runs/smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive cai_cli

# Known vulnerabilities of the pinned dependencies (constraints.txt). Warns when no vulnerability service is reachable.
audit: setup
	$(BIN)/python tests/audit.py

# Line coverage of `make test` and its subprocesses; fails below the share in pyproject.toml.
coverage: setup
	rm -rf runs/coverage && mkdir -p runs/coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Mutation tests of the code that reads rows, builds prompts and makes labels (pyproject.toml); survivors are listed last.
# mutmut's own dependencies stay out of the environment. A second run resumes the first.
mutants: setup .mutants-env
	-PYTHONPATH=.mutants-env OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 2
	PYTHONPATH=.mutants-env $(BIN)/python -m mutmut results

.mutants-env:
	$(BIN)/pip install --quiet --target $@ mutmut==3.8.1

docs: setup
	$(BIN)/python tests/cli_docs.py > docs/cli.md

clean:
	rm -rf $(VENV) .server-venv .vllm-venv .mutants-env mutants runs
