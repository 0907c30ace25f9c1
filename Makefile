.PHONY: setup lint test test-all golden bench lock

setup:
	./scripts/setup.sh --dev

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/lint-imports --no-logo && .venv/bin/pyrefly check

test:
	./scripts/test.sh

test-all:
	./scripts/test.sh -m ''

golden: setup
	.venv/bin/python scripts/golden.py

bench: setup
	.venv/bin/python scripts/bench/step.py && .venv/bin/python scripts/bench/data.py

lock:
	./scripts/lock.sh
