# The project's commands. Everything runs from the project's own .venv, which 'make setup' builds and keeps up to date.
# The first python3 on PATH is used; choose another by: make setup PYTHON=/path/to/python3.12

PYTHON ?= python3
VENV := .venv/bin
STAMP := .venv/.nas-setup
# The interpreter that was named, where it is another one than that of .venv: then .venv is made anew.
NAMED := $(if $(filter-out file default undefined,$(origin PYTHON)),$(PYTHON))
OTHER := $(if $(and $(wildcard $(STAMP)),$(NAMED)),$(if $(filter $(NAMED),$(shell cat $(STAMP))),,yes))

.PHONY: another-interpreter help setup search test check bench clean

help:
	@echo "make search   set-up, then the default experiment to its end (experiments/quickstart.yaml)"
	@echo "make test     set-up, then the test suite"
	@echo "make check    set-up, then lint, format, types and the test suite"
	@echo "make bench    the benchmarks; one of them by: make bench NAME=estimate ARGS=--json"
	@echo "make setup    the environment .venv alone; another interpreter by: make setup PYTHON=python3.12"
	@echo "make clean    removes .venv and caches (not runs/, not latency_tables/)"

setup: $(STAMP)

# Done again only when the dependencies or the named interpreter change. An interrupted set-up leaves no stamp, so the next one completes it.
$(STAMP): pyproject.toml constraints.txt $(if $(OTHER),another-interpreter)
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "error: '$(PYTHON)' was not found. Python 3.11 or newer is needed; name it: make setup PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Python 3.11 or newer is needed; name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "setting up .venv (about two minutes, once)"
	@"$(PYTHON)" -m venv $(if $(OTHER),--clear )'.venv'
	@"$(VENV)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "$(PYTHON)" > "$(STAMP)"

search: setup
	@"$(VENV)/nas" search experiments/quickstart.yaml $(ARGS)

test: setup
	@"$(VENV)/python" -m pytest -q -n 2 --dist loadfile $(ARGS)

check: setup
	@"$(VENV)/python" -m ruff check .
	@"$(VENV)/python" -m ruff format --check .
	@"$(VENV)/python" -m mypy
	@"$(VENV)/python" -m pytest -q -n 2 --dist loadfile $(ARGS)

bench: setup
	@"$(VENV)/python" -m benchmarks $(NAME) $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
