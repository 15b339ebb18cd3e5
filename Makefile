# Two targets for people: `make demo` and `make test`. Everything is installed into $(VENV) and nowhere else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT := build/demo
# The compiled library is built where there is a C++ compiler; without one the torch reference answers.
INSTALL := $(BIN)/pip install --quiet --no-build-isolation -c constraints.txt
# CUDA builds of torch bring their own Triton. For others, the release that the resource gate of the kernels was set with.
TRITON := 'triton==3.6.0; platform_system == "Linux"'
# Which tests; as in pyproject.toml, where it is what pytest does by itself.
MARKED = not benchmark
SOURCES := $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test quick coverage suite checks mutants resources lint types bench families families-roundtrip clean

$(VENV)/.base: constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch numpy 'setuptools>=77'
	touch $@

$(VENV)/.demo: $(VENV)/.base $(SOURCES)
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.base $(SOURCES)
	$(INSTALL) -e '.[test]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet $(TRITON)
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	rm -rf $(DEMO_OUT)
	$(BIN)/python examples/demo.py "$$($(BIN)/python tests/support/real_model.py)" $(DEMO_OUT)

# Linters and tests side by side: neither keeps two processors busy all the time.
test: $(VENV)/.test
	$(MAKE) --no-print-directory -j 2 checks suite

# What to run many times a day: all but the tests that interpret or compile kernels, train, or start processes.
quick: $(VENV)/.test
	$(MAKE) --no-print-directory -j 2 checks suite MARKED='not slow and not benchmark'

# Twice as long as the tests alone, and so by itself.
coverage: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered --cov-fail-under=95

suite: $(VENV)/.test
	$(BIN)/python -m pytest -n auto -m '$(MARKED)'

checks: lint types

# The documentation is built too: a link or a reference that leads nowhere is an error (but not with --quiet).
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

types: $(VENV)/.test
	$(BIN)/mypy

# What Triton's compiler makes of every kernel, compiled from nothing: after a change to a kernel. The oldest and the newest
# Triton, and every kind of GPU: half an hour.
TRITONS := 3.6.0 3.9.0
CAPABILITIES := 80,86,89,90,100,103,120
resources: $(VENV)/.test
	rm -f tests/data/triton_resources.json
	for version in $(TRITONS); do \
	  $(BIN)/pip install --quiet --no-deps --upgrade --target build/triton-$$version triton==$$version && \
	  export TRITON_AOT=record PYTHONPATH=build/triton-$$version:. && \
	  $(BIN)/python tests/support/triton_aot.py $(CAPABILITIES) 3072,768,129 64,16,64 >/dev/null && \
	  $(BIN)/python tests/support/triton_aot_mlp.py $(CAPABILITIES) >/dev/null && \
	  $(BIN)/python tests/support/triton_aot_sparse.py $(CAPABILITIES) >/dev/null && \
	  $(BIN)/python tests/support/triton_aot_hadamard.py $(CAPABILITIES) >/dev/null && \
	  $(BIN)/python tests/support/triton_aot_ntk.py $(CAPABILITIES) >/dev/null && \
	  $(BIN)/python tests/support/triton_driver.py 90 all >/dev/null || exit 1; done

mutants: $(VENV)/.test
	$(BIN)/pip install --quiet cosmic-ray
	PATH=$(abspath $(BIN)):$$PATH tests/mutants.sh $(MODULES)

bench: $(VENV)/.test
	$(BIN)/python bench/main_job.py

# Every model type of transformers: an hour of one core; what is in build/families.jsonl is not repeated.
families: $(VENV)/.test
	$(BIN)/python bench/families.py

# A small real model of every type that has FFNs, there and back; what is in build/families_roundtrip.jsonl is not repeated.
families-roundtrip: $(VENV)/.test
	$(BIN)/python bench/families_roundtrip.py

clean:
	rm -rf build $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage *.egg-info fusion_kernels/*.so
