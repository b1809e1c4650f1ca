# The README's two commands are `make demo` and `make test`; each makes a virtual environment and installs what it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test conformance suite lint types docs protocol build bench clean

# torch first and from pip: with the pinned release installed, nothing later pulls another build of it.
$(VENV)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.core:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

demo: $(VENV)/.core
	$(BIN)/accelrt demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not suite and not gpu"

# ONNX's whole backend suite, on four targets of the CPU and lowered to torch.
conformance: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "suite" tests/contract/test_onnx_suite.py tests/contract/test_lowering_suite.py

# All that takes minutes: that suite on every target, models of gigabytes, faults and fuzzers in their long forms.
suite: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "suite"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

protocol: $(VENV)/.test
	cd src && ../$(VENV)/bin/python -m grpc_tools.protoc -I. --include_imports \
		--descriptor_set_out=accelrt/protocol/messages.binpb accelrt/protocol/inference.proto

build: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build --outdir dist

bench: $(VENV)/.test
	missed=0; for script in predict_overhead import_cost cut_cost reload precision offline cuts auto scheduler pipeline eia serve; do \
		$(BIN)/python benchmarks/$$script.py || missed=1; done; exit $$missed

clean:
	rm -rf $(VENV) dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
