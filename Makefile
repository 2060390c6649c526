# `make test` and `make demo` do all their own set-up in .venv; the first call takes minutes, the second none.
#   make test TESTS=tests/kernels    a selection           make test VENV=    the active environment, without network
#   make demo QUICK=1                the short form        make test PYTHON=python3.12    the interpreter of .venv
#   make peers                       the packages to compare with, in .peers: with them `make test` also runs TRL's trainer

VENV    ?= .venv
PYTHON  ?= python3
TESTS   ?= tests
WORKERS ?= 2

BIN     := $(if $(VENV),$(VENV)/bin/)
STAMP   := $(or $(VENV),build)/.installed
SOURCES := $(wildcard csrc/*)

.PHONY: test demo peers clean

test: $(STAMP)
	$(BIN)pytest -n $(WORKERS) --dist worksteal $(TESTS)

demo: $(STAMP)
	$(BIN)twinhead demo $(if $(QUICK),--quick)

peers: $(STAMP)
	$(BIN)python3 -m benchmarks peers

clean:
	rm -rf .venv build *.egg-info kernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A change in csrc/ only rebuilds the extension; anything else installs again.
$(STAMP): pyproject.toml setup.py $(SOURCES)
ifeq ($(VENV),)
	python3 -m pip install --no-deps --no-build-isolation --editable .
else
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " + sys.version)'
	$(BIN)python3 -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)python3 -c 'import torch' 2>/dev/null || $(BIN)python3 -m pip install torch==2.13.0
	$(if $(filter-out $(SOURCES),$?),$(BIN)python3 -m pip install --editable '.[dev]',$(BIN)python3 setup.py build_ext --inplace)
endif
	@mkdir -p $(@D) && touch $@
