# Everything happens in .venv, made by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
# The versions that CI tests; `make CONSTRAINTS= demo` takes the newest instead.
CONSTRAINTS ?= -c requirements/ci.txt
JOBS ?= 2

.PHONY: demo story test lint families docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/board/demo.py

# Pairs of three base seeds with all controls, two of which are trained first; an interrupted run continues.
story: $(VENV)/.installed
	$(BIN)/python examples/board/story.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

families: $(VENV)/.installed
	$(BIN)/python -m pytest tests/merge/test_families.py --update-families

# The tools of the documentation have a .venv of their own and import the package from the tests' one.
docs: $(VENV)/.installed $(DOCS)/.installed
	PYTHONPATH=.:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		$(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -r requirements/docs.txt
	touch $@

$(VENV)/.installed: pyproject.toml requirements/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) out site
