.PHONY: setup lint test test-all test-configs test-slices golden bench lock

setup:
	./scripts/setup.sh --dev

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/lint-imports --no-logo && .venv/bin/pyrefly check

test:
	./scripts/test.sh

# Then the tests of data/ again, with annotations checked at every call, and real runs that are broken in every way (about
# 5 minutes). Modules left out take arrays for ints, rows of two kinds, or values that they check themselves.
checked := $(filter-out %.__init__ data.batches.batches data.prepare.prepare data.stores.arrays data.stores.store data.stores.vocabulary,$(subst /,.,$(basename $(wildcard data/*.py data/*/*.py))))
comma := ,
test-all:
	./scripts/test.sh -m 'not hours'
	.venv/bin/python -m pytest -q tests/data --jaxtyping-packages=$(subst $() ,$(comma),$(checked)),beartype.beartype
	.venv/bin/python scripts/faults.py

# Shipped configs trained to the loss that their headers state: hours on two cores.
test-configs: setup
	.venv/bin/python -m pytest -q -m hours tests/pretrain/run/test_learns.py

# Every shipped config compiled for the slice that its header names, and the largest for 64 and 256 chips with the layout
# that `pretrain plan --search` names: about two hours on one core.
test-slices: setup
	.venv/bin/python -m pytest -q -n 0 -m 'aot and (slow or hours)' tests/pretrain/planner/test_shipped.py tests/pretrain/planner/test_large_slices.py

golden: setup
	.venv/bin/python scripts/golden.py

bench: setup
	.venv/bin/python scripts/bench/step.py && .venv/bin/python scripts/bench/data.py

lock:
	./scripts/lock.sh
