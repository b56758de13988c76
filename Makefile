# "make help" lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

NAME =
ARGS =
OUT = out

ifdef PYTHON
READY := interpreter
else
PYTHON := .venv/bin/python
READY := .venv/requirements.txt
endif

.PHONY: help setup test experiment results check clean named interpreter

help: ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 18
	echo
	echo 'PYTHON=python3 uses that interpreter instead of .venv, if it has what requirements.txt asks for.'

setup: $(READY) ## .venv with what requirements.txt pins (the others imply it)
	@echo "$(PYTHON) is ready"

test: $(READY) ## prove every kernel exact; HYPOTHESIS_PROFILE=quick|default|ci, ARGS='-k fwd_v2'
	@parallel=$$($(PYTHON) -c 'import xdist; print("-n auto")' 2>/dev/null || true)
	$(PYTHON) -m pytest $$parallel $(ARGS)

experiment: named $(READY) ## make experiment NAME=loop_order ARGS='--seqlen 128' OUT=out
	@$(PYTHON) -m experiments run $(NAME) --out '$(OUT)' $(ARGS)

results: $(READY) ## what results/ holds, measured on the GPU here; goes on where it stopped; ARGS='--only bench'
	@$(PYTHON) -m experiments all $(ARGS)

named:
	@if [ -z '$(NAME)' ]; then
		echo 'which experiment?  make experiment NAME=...' >&2
		grep -l '^EXPERIMENT = ' experiments/*.py | sed -E 's|experiments/(.*)\.py|    \1|' >&2
		exit 2
	fi

check: $(READY) ## lint, format, and whether README's tables are what results/ holds
	@$(PYTHON) requirements.py ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m sandbox.records --check

clean: ## remove .venv and caches; out/ stays
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The copy of requirements.txt is made last: a set-up that was cut short is done again, from the start if it was the first.
.venv/requirements.txt: requirements.txt
	@exec 9<requirements.txt
	if command -v flock >/dev/null; then flock 9; fi  # of two at once, one waits
	if [ -e .venv/unfinished ]; then rm -rf .venv; fi
	if cmp -s requirements.txt $@; then touch $@; exit; fi
	for python in python3 python3.13 python3.12 python3.11 none; do
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
	done
	if [ $$python = none ]; then
		echo 'Python 3.11 or later is needed; python3 is' "$$(python3 --version 2>&1 || true)" >&2
		exit 1
	fi
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then
		echo "$$python cannot make a virtual environment: install it (Debian, Ubuntu: apt install python3-venv)" >&2
		echo 'or name an interpreter that has what requirements.txt asks for: make ... PYTHON=python3' >&2
		exit 1
	fi
	echo "setting up .venv, once: some minutes and about 2 GB"
	if [ ! -d .venv ]; then mkdir .venv; touch .venv/unfinished; fi
	$$python -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --no-compile -r requirements.txt
	.venv/bin/python requirements.py
	rm -f .venv/unfinished
	cp requirements.txt $@

interpreter:
	@$(PYTHON) requirements.py
