# One word a habit. Everything runs in .venv, which any target builds when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
# one thread a process and a process a core: the tests' networks are too small to be shared out
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# how many seeds `make processors` tries under each instruction set
SEEDS ?= 5
# how many damaged datasets `make fuzz` tries, and what decides how they are damaged
CASES ?= 10000
FUZZ_SEED ?= 0

# how many kills `make soak` makes, and what decides where they fall
KILLS ?= 1000
SOAK_SEED ?= 0

.PHONY: help demo test quick check stores wheel processors fuzz soak docs format clean

help:
	@echo "make demo    build the environment, train on three made datasets, show the result (five minutes, and a few for the environment)"
	@echo "make test    build the environment, run every test"
	@echo "make quick   the tests that take seconds"
	@echo "make check   formatting, lints, types, layers of imports, every test"
	@echo "make stores  the tests of S3 and Google Cloud Storage, with S3's packages in build/stores"
	@echo "make wheel   build the wheel into dist/"
	@echo "make docs    build the documentation into site/; a broken link fails"
	@echo "make processors  the tests that train, as other processors would run them (SEEDS=5 of each)"
	@echo "make fuzz    thousands of damaged datasets, images, configurations and checkpoints (CASES=10000 of datasets)"
	@echo "make soak    kills runs at any moment: they must go on to the same weights (KILLS=1000; goes on with build/soak-0.jsonl)"
	@echo "make format  let ruff rewrite what it can"

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version); try: make PYTHON=python3.12"; exit 1; }
	@echo "Building the environment in .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bundled,tensorboard,supervision,serve,docs,dev]'
	@touch $@

demo: .venv/.ready
	$(BIN)/metr demo

test: .venv/.ready
	$(PYTEST)

quick: .venv/.ready
	$(PYTEST) -m "not slow"

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory test

# botocore, which s3fs and moto rest on, wants a python-dateutil below 3: these packages lie beside the environment
STORES := build/stores
$(STORES)/.ready: .venv/.ready
	rm -rf $(STORES)
	mkdir -p $(STORES)
	grep -v '^python-dateutil==' constraints.txt > $(STORES)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(STORES) -c $(STORES)/constraints.txt \
	  s3fs==2026.9.0 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5
	@touch $@

stores: $(STORES)/.ready
	PYTHONPATH=$(STORES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/data/test_shards_buckets.py

# without isolation: the build backend is the pinned one, and nothing is fetched
wheel: .venv/.ready
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

processors: .venv/.ready
	$(BIN)/python tests/processors.py --seeds $(SEEDS)

fuzz: .venv/.ready
	$(BIN)/python tests/fuzz/fuzzing.py --annotations $(CASES) --identities $(CASES) --images 2000 --configurations 1000 \
	  --checkpoints 1000 --seed $(FUZZ_SEED)

soak: .venv/.ready
	$(BIN)/python tests/soak/killing.py --kills $(KILLS) --seed $(SOAK_SEED) --log build/soak-$(SOAK_SEED).jsonl

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist site .mypy_cache .ruff_cache .pytest_cache
