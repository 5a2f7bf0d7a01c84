# Everything happens in .venv, made by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
PICTURES := .venv-pictures
FLOORS := .venv-floors
# The versions that CI tests; `make CONSTRAINTS= demo` takes the newest instead.
CONSTRAINTS ?= -c requirements/ci.txt
JOBS ?= 2
ROUNDS ?= 3
# Without their bytecode torch and transformers are compiled again in every process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo story test tests lint families bench pictures floors docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/board/demo.py

# Five pairs of four base seeds with all controls, four of which are trained first; an interrupted run continues.
story: $(VENV)/.installed
	$(BIN)/python examples/board/story.py

test: lint tests

tests: $(VENV)/.installed
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m slipcover --source mergekit_snrf --json --out build/coverage.json \
		-m pytest -n $(JOBS) --dist worksteal
	$(BIN)/python -m slipcover --skip-covered --fail-under 95 --out build/coverage.json --merge build/coverage.json \
		|| { echo "The tests cover less than 95 % of the lines."; exit 1; }

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

families: $(VENV)/.installed
	$(BIN)/python -m pytest tests/merge/test_families.py --update-families

# All figures of docs/speed.md, on an idle machine with 15 GB of free disk: with ROUNDS=2 about an hour on two cores.
bench: $(VENV)/.installed
	mkdir -p build/bench
	$(BIN)/python benchmarks/imports.py --json build/bench/imports.json | tee build/bench/imports.txt
	for size in 0.5B 7B-4layers; do \
		$(BIN)/python benchmarks/merge.py --size $$size --rank 16 --rank 64 --workers 1 --workers 2 --workers 4 \
			--repeats $(ROUNDS) --json build/bench/merge-$$size.json | tee build/bench/merge-$$size.txt && \
		$(BIN)/python benchmarks/patch.py --size $$size --repeats $(ROUNDS) --json build/bench/patch-$$size.json \
			| tee build/bench/patch-$$size.txt || exit 1; \
	done
	$(BIN)/python benchmarks/merge.py --size 7B-4layers --only regmean --sketch 512 --repeats $(ROUNDS) \
		--json build/bench/merge-sketch.json | tee build/bench/merge-sketch.txt
	$(BIN)/python benchmarks/profiling.py --rounds $(ROUNDS) --json build/bench/profiling.json \
		| tee build/bench/profiling.txt
	$(BIN)/python benchmarks/lowrank.py --rounds $(ROUNDS) --json build/bench/lowrank.json \
		| tee build/bench/lowrank.txt
	$(BIN)/python benchmarks/table.py build/bench

# Processors that need torchvision, which belongs to one release of torch: an environment of their own.
pictures: $(PICTURES)/.installed
	OMP_NUM_THREADS=1 $(PICTURES)/bin/python -m pytest tests/test_pictures.py

$(PICTURES)/.installed: pyproject.toml requirements/ci.txt
	$(PYTHON) -m venv $(PICTURES)
	grep -v '^torch==' requirements/ci.txt > $(PICTURES)/constraints.txt
	$(PICTURES)/bin/python -m pip install --quiet --disable-pip-version-check -c $(PICTURES)/constraints.txt \
		torch==2.14.1 torchvision==0.29.1 -e ".[dev]"
	touch $@

# The lowest versions that pyproject.toml allows (PYTHON=python3.10), and tests of every room; torch's wheels are large.
floors: $(FLOORS)/.installed
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest tests/neurons/test_maskfile.py tests/fusion/test_fusion.py \
		tests/fusion/test_regmean.py tests/files/test_container.py tests/models/test_loading.py tests/merge/test_lora.py \
		tests/merge/test_session.py tests/merge/test_sharing.py tests/profiling/test_run.py tests/profiling/test_probes.py \
		tests/evidence/test_figures.py tests/cli/test_init.py

$(FLOORS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(FLOORS)/bin/uv pip compile --quiet --python $(FLOORS)/bin/python --resolution lowest-direct \
		--extra profile --extra analysis -o $(FLOORS)/floors.txt pyproject.toml
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check -r $(FLOORS)/floors.txt \
		torchvision pytest hypothesis -e .
	touch $@

# The tools of the documentation have a .venv of their own and import the package from the tests' one.
docs: $(VENV)/.installed $(DOCS)/.installed
	PYTHONPATH=.:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		$(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $(CONSTRAINTS) -r requirements/docs.txt
	touch $@

$(VENV)/.installed: pyproject.toml requirements/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) $(PICTURES) $(FLOORS) build out site
