# make test, make demo: from a fresh clone with Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

.PHONY: help test demo ci clean

help:
	@echo "make test   run the tests (on a GPU machine the GPU tests too); PYTEST_ARGS=... is passed on"
	@echo "make demo   train small models, serve them together, compare with eager and Inductor"
	@echo "make ci     everything that .ci/run checks"
	@echo "make clean  remove the virtual environment and build outputs"

$(VENV)/.ready: pyproject.toml constraints.txt .ci/bootstrap.py
	$(PYTHON) .ci/bootstrap.py $(VENV) test
	@touch $@ $(VENV)/.demo

# What the demo alone needs is a part of what the tests need.
$(VENV)/.demo: pyproject.toml constraints.txt .ci/bootstrap.py
	$(PYTHON) .ci/bootstrap.py $(VENV) demo
	@touch $@

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

demo: $(VENV)/.demo
	$(VENV)/bin/torch-mux demo

ci:
	.ci/run

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
