# The commands for people; `make help` lists them.
PYTHON ?= $(shell scripts/find-python)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint up deb install-user uninstall-user plugins test-systemd-newer clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 28

setup: .venv/.ready plugins/example.wasm  ## create .venv, with circleosd and circlectl in .venv/bin

# Not where it was made, or not with this Python any more: make it anew.
ifneq ($(file <.venv/.ready),$(CURDIR) $(realpath .venv/bin/python3))
.PHONY: .venv/.ready
endif
.venv/.ready: requirements.lock pyproject.toml scripts/setup
	@scripts/setup "$(PYTHON)"
	@echo "$(CURDIR) $$(realpath .venv/bin/python3)" >$@

plugins/%.wasm: plugins/%.wat | .venv/.ready
	@$(BIN)/python plugins/wat2wasm.py $< $@

demo: setup  ## watch CircleOSD do its main job, in a throw-away directory
	@scripts/demo

up: setup  ## run CircleOSD in the foreground until Ctrl-C, without systemd
	@$(BIN)/circleosd up

plugins: setup  ## build the example plugins from source; those whose tools are missing are skipped, with a note
	@PATH="$(abspath $(BIN)):$$PATH" $(MAKE) --no-print-directory -C plugins PYTHON=$(abspath $(BIN)/python)

deb: setup  ## build a Debian package in dist/
	@scripts/build-deb

install-user: setup  ## run CircleOSD from here in your own systemd manager
	@scripts/user-units install

uninstall-user:  ## undo install-user
	@scripts/user-units uninstall

lint: setup  ## run ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## run all tests; as root also those on a booted systemd
	@scripts/test-packages
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test-systemd-newer: setup  ## run the tests on a booted systemd with trixie's version, as root
	@scripts/test-systemd-newer

clean:  ## remove what the targets above created
	rm -rf .venv build dist plugins/*.wasm .pytest_cache .mypy_cache .ruff_cache
