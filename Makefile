# csvfast: the two commands, and what they are made of. Everything lands in .venv and build; `make clean` removes both.
#
#   make demo     environment, build, then the life of a confidential container (ARGS=--engine: measurement and speed)
#   make test     environment with the test and bench extras, build, then every check there is
#
#   make venv     the environment with csvfast installed         make bench    csvfast bench
#   make lint     ruff and mypy                                   make pytest   the Python tests alone (ARGS="-k ...")
#   make c        the C library alone, in csrc/build              make dist     sdist and wheel, in dist
#   make clean
#
# Knobs: PYTHON=python3.12  CSVFAST_KERNEL=...  CI=true (skips not listed in tests/expected-skips.txt fail the run)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

# Whatever the installed package is made of: a change here installs anew, anything else does not.
PACKAGE_SOURCES := $(wildcard setup.py _csvfast_command.py pyproject.toml MANIFEST.in) \
    $(shell find csvfast csrc -not -path 'csrc/build*' \( -name '*.py' -o -name '*.pyx' -o -name '*.pxi' -o -name '*.pxd' \
    -o -name '*.pyi' -o -name '*.c' -o -name '*.h' \) -not -path 'csrc/tests/*' -not -path 'csrc/fuzz/*' \
    -not -path 'csrc/bench/*')

.PHONY: help demo test venv test-venv bench lint pytest c dist clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	@$(RUN) tools/demo.py $(ARGS)

test: $(VENV)/.installed-test
	@$(RUN) tools/run_tests.py $(ARGS)

venv: $(VENV)/.installed
test-venv: $(VENV)/.installed-test

# A stamp and not the interpreter: that one is a link, and make looks at the age of what it points to.
$(VENV)/.made: tools/make-venv.sh
	@PYTHON='$(PYTHON)' sh tools/make-venv.sh $(VENV)
	@touch $@

# Not editable: what runs is what a user installs, and no build product appears among the sources. The core stamp is
# newer than the test one only when `make demo` built last; each one puts the sources of today in place.
$(VENV)/.installed: $(VENV)/.made $(PACKAGE_SOURCES)
	@$(RUN) tools/install.py '.[broker,unicorn]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made $(PACKAGE_SOURCES)
	@$(RUN) tools/install.py '.[test,bench]'
	@touch $(VENV)/.installed $@

bench: $(VENV)/.installed-test
	@$(RUN) -m csvfast bench $(ARGS)

lint: $(VENV)/.installed-test
	@$(RUN) tools/run_tests.py --only lint

pytest: $(VENV)/.installed-test
	@$(RUN) -m pytest -p tests.skips $(ARGS)

c:
	@$(MAKE) -C csrc

dist: $(VENV)/.installed-test
	@$(RUN) -m pip install --quiet build && $(RUN) -m build

clean:
	rm -rf $(VENV) build dist csrc/build csvfast.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
