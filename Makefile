# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench soak audit clean

demo: .venv/.installed-desk
	$(BIN)/ami demo

test: .venv/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -m "not soak"

bench: .venv/.installed-test
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

soak: .venv/.installed-test
	$(BIN)/pytest -m soak --timeout=3600

audit: .venv/.installed-audit
	$(BIN)/pip-audit --skip-editable

.venv/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output
