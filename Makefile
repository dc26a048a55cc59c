# `make demo` and `make test` set everything up in .venv; nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test faults lint docs clean

demo: .venv/installed
	$(BIN)/python -m mlx_tokprune.demo

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

faults: .venv/installed-test
	cd tests && ../$(BIN)/python -m faults --cases 2000 --seed 0

docs: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(BIN)/mkdocs build --strict -q

lint: .venv/installed-test
	$(BIN)/python -m pip install -q ruff pyright codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info demo-output
