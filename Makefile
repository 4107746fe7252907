# make notebook      build the notebook, execute it for the hardware found, print the scorecard (writes build/ only)
# make test          lint, format, and the tests that are quick
# make test-slow     lint, format, and all tests, kept in resources/measurements/tests.json: before a release
# make publish       on a GPU: test-slow unless it passed with this code; the run, kept: notebook, resources/, README, RESULTS
# make publish UNTESTED=1    the same without test-slow, which the release then says
# make sweeps        on a GPU: the sweeps that are too long for the notebook, kept for it in resources/measurements/
# make sweeps-gpus   on two GPUs: one GPU and both compared, kept in resources/measurements/
# make gpu-test      on a GPU: the gpu-marked tests, their summary kept in resources/measurements/
# make rehearsal     on a GPU: the whole notebook as a T4 would have to run it
# make colab-check   the notebook alone in an environment with the versions of Colab's runtime
# make matrix        the quick tests and the kernels with every set of supported releases: build/matrix, hours on two cores
# make clean         remove build/
#
# Each but clean makes .venv on its first call. `VENV=none` uses the interpreter PYTHON as it is and installs nothing.

NOTEBOOK := Rohit_Unsloth_Puzzles.ipynb
MEASURED := resources/measurements
VENV ?= .venv
FITS := import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c "$(FITS)" 2>/dev/null && echo $$p && break; done)

ifeq ($(VENV),none)
READY :=
RUN := $(PYTHON)
else
READY := $(VENV)/.installed
RUN := $(VENV)/bin/python
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help notebook test test-slow smollm2 publish sweeps sweeps-gpus gpu-test rehearsal colab-check matrix build clean

help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/.installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed: make ... PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c "$(FITS)" || { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13 with venv"; exit 1; }
	@echo "Installing into $(VENV), about 6 GB ..."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

build: $(READY)
	@$(RUN) -m tools.build_notebook --output build/$(NOTEBOOK)

notebook: build
	$(RUN) -m tools.run_notebook build/$(NOTEBOOK) build/run --measured $(MEASURED)

test-slow: smollm2
test: TIER := -m "not slow"
test-slow: TIER := -p tools.record_tests
test test-slow: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TIER)

# Tests with real weights are skipped, and recorded as skipped, where it cannot be had.
smollm2: $(READY)
	-$(RUN) -m benchmarks.smollm2 build/model

publish: build
	@test -n "$(UNTESTED)" || $(RUN) -m tools.release tested || $(MAKE) test-slow
	$(RUN) -m tools.run_notebook build/$(NOTEBOOK) build/run --measured $(MEASURED) --need-gpu
	$(RUN) -m tools.release publish build/run $(if $(UNTESTED),--untested)
	$(RUN) -m tools.build_readme

sweeps: $(READY)
	$(RUN) -m benchmarks.nf4.sweeps $(MEASURED)/a_nf4_sweeps.json
	$(RUN) -m benchmarks.backprop.sweeps $(MEASURED)/e_backprop_sweeps.json
	$(RUN) -m benchmarks.compiled.sweeps $(MEASURED)/c_compile_sweeps.json
	$(RUN) -m benchmarks.vision.sweeps $(MEASURED)/d_vision_sweeps.json
	$(RUN) -m benchmarks.classification.sweeps $(MEASURED)/d_classification_sweeps.json
	$(RUN) -m benchmarks.tool_calling.sweeps $(MEASURED)/d_tool_calling_sweeps.json

sweeps-gpus: $(READY)
	$(RUN) -m benchmarks.fsdp2.sweeps $(MEASURED)/b_fsdp2_sweeps.json

gpu-test: $(READY)
	$(RUN) -m tools.gpu_tests

rehearsal: build
	$(RUN) -m tools.t4

# A new environment with the versions of Colab's runtime; all else must come from the notebook's own install cell.
COLAB_PYTHON ?= $(shell for p in python3.13 $(HOME)/.pyenv/versions/3.13*/bin/python3.13 $(PYTHON); do \
	$$p -c "import venv" 2>/dev/null && echo $$p && break; done)
colab-check: build
	rm -rf build/colab-venv
	$(or $(COLAB_PYTHON),$(RUN)) -m venv build/colab-venv
	build/colab-venv/bin/python -m pip install --quiet --disable-pip-version-check -r notebook/colab.txt
	$(RUN) -m tools.run_notebook build/$(NOTEBOOK) build/colab --strict --python $(CURDIR)/build/colab-venv/bin/python

matrix: $(READY)
	$(RUN) -m tools.matrix $(ENVIRONMENTS)

clean:
	rm -rf build
