#!/usr/bin/env bash
# Resolves the dependencies of setup.cfg again: two files from one resolution, with hashes, for Python >= 3.11. Needs uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
compile=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes)
compile+=(-c scripts/constraints.txt)
"${compile[@]}" "$@" setup.cfg -o requirements.lock
"${compile[@]}" "$@" --extra dev --extra tpu -c requirements.lock setup.cfg -o requirements-dev.lock
