# make demo   detect in a photograph          make test   run the tests
# Both make the virtual environment, its packages and the compiled operators if they are not there.
# PYTHON=python3.12 picks an interpreter, TORCH="torch==2.9.*" a torch, WITH_CUDA=0 leaves out CUDA.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(VENV)/bin/python demo.py --stages --json --output out

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(INSTALLED): pyproject.toml setup.py $(wildcard */csrc/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "setuptools>=77" wheel ninja "$(TORCH)"
	$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf build *.egg-info */_C*.so $(VENV)
