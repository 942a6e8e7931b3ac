# Two commands for a fresh machine with Python and make:
#   make demo   train embeddings on real text, then a short benchmark table
#   make test   lint, type-check and test everything; then the kernels on a TPU, if any
# And make bench: every benchmark, with figures and a report, in runs/bench; QUICK=1 for
# a minute of it.
# PYTHON picks the interpreter (3.11 to 3.13); VENV the environment it makes.
# On a host with a TPU, `demo`, `bench` and the last part of `test` run on the TPU.
# JAX_PLATFORMS=cpu keeps them off it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
# A TPU host has a PCI device whose vendor is Google, and a device node for each chip. It
# takes both to tell: Google's network cards have the same vendor, and the accelerators
# of others have nodes of the same names.
GOOGLE_PCI := $(shell grep -ls 0x1ae0 /sys/bus/pci/devices/*/vendor)
TPU_NODES := $(wildcard /dev/accel[0-9]* /dev/vfio/[0-9]*)
TPU := $(and $(GOOGLE_PCI),$(TPU_NODES))
# The tests compile for TPUs by libtpu and run on the CPU: they must look for no TPU.
check static campaign sanitize mutants soak: export JAX_PLATFORMS ?= cpu
demo bench chip: export JAX_PLATFORMS ?= $(if $(TPU),tpu$(comma)cpu,cpu)

# An editable package is compiled when it is installed.
COMPILED := pyproject.toml hatch_build.py \
    $(foreach kind,cc h inc,$(wildcard sparse_adam/kernels/cpu/*.$(kind))) \
    $(wildcard sparse_adam/kernels/cpu/rules/*.cc)

.PHONY: demo test lint types check chip site bench static campaign sanitize mutants soak clean

demo: $(VENV)/.demo
	$(BIN)/python examples/train_word2vec.py
	$(BIN)/python -m benchmarks update --quick

test: lint types check $(if $(TPU),chip)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright --project . --pythonpath $(BIN)/python

check: $(VENV)/.test
	$(BIN)/pytest -n 2 --dist worksteal

# The documentation, in runs/site/index.html; the tests build it too.
site: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Every implementation that runs here, against the reference.
chip: $(VENV)/.test
	mkdir -p runs
	$(BIN)/python -m sparse_adam.check --report runs/sparse_adam_check.txt

# Rows that share lines when packed, beside XLA's programs for plain arrays of them.
NARROW := --dim 16 --dim 32 --dim 64 --program packed_sparsecore \
    --program packed_tensorcore --program xla_sorted --program xla_unsorted \
    --no-loops --out runs/bench/static_narrow.json
# The sorts of a plan, by the kernel and by XLA.
SORTS := $(foreach sort,kernel_word xla_word kernel_pairs xla_pairs,\
    --program benchmarks.static.sorts:$(sort)) --no-loops --timeout 60 \
    --out runs/bench/static_sorts.json
# Linux's large pages, for all that glibc allocates.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
ON_HUGE_PAGES := --case uniform --case small_batch --case dim_64 --case dim_16 \
    --impl cpu --impl packed --impl copy --out runs/bench/huge_pages.json
# Commands fail where a contender does; the report is made all the same.
QUICK_FLAG := $(if $(QUICK),--quick)
bench: $(VENV)/.bench
	-$(BIN)/python -m benchmarks update $(QUICK_FLAG)
	$(if $(QUICK),,-$(HUGE_PAGES) $(BIN)/python -m benchmarks update $(ON_HUGE_PAGES))
	-$(BIN)/python -m benchmarks scale $(QUICK_FLAG)
	-$(BIN)/python -m benchmarks lookup $(QUICK_FLAG)
	-$(BIN)/python -m benchmarks step $(QUICK_FLAG)
	-$(BIN)/python -m benchmarks static --timeout 60 $(QUICK_FLAG)
	$(if $(QUICK),,-$(BIN)/python -m benchmarks static $(NARROW))
	$(if $(QUICK),,-$(BIN)/python -m benchmarks static $(SORTS))
	$(BIN)/python -m benchmarks report runs/bench

# Instruction bundles per row of the compiled TPU programs; needs no TPU.
static: $(VENV)/.test
	$(BIN)/python -m benchmarks static

# Random cases for hours, faults that the tests must find, and a training that is killed
# again and again; see docs/testing.md. DISK is a small one, which the soak may fill.
HOURS ?= 1
campaign: $(VENV)/.test
	$(BIN)/python -m tests.campaign --hours $(HOURS)

sanitize: $(VENV)/.test
	$(BIN)/python -m tests.campaign --sanitize address --hours $(HOURS)
	$(BIN)/python -m tests.campaign --sanitize thread --hours $(HOURS)
	$(BIN)/python -m tests.campaign --sanitize address --calls --hours $(HOURS)
	$(BIN)/python -m tests.campaign --sanitize thread --calls --hours $(HOURS)

mutants: $(VENV)/.test
	$(BIN)/python -m tests.mutants

MINUTES ?= 60
soak: $(VENV)/.test
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(DISK),--folder $(DISK))

$(VENV)/.demo: $(COMPILED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[bench,examples$(if $(TPU),$(comma)tpu)]'
	touch $@

$(VENV)/.bench: $(COMPILED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[bench,peers,tpu]'
	touch $@

$(VENV)/.test: $(COMPILED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist
