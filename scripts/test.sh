#!/usr/bin/env bash
# Everything that must pass before a commit: style, layers, types, the fast suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh --dev
bin=$PWD/.venv/bin
step() { printf '\n== %s\n' "$*" >&2; "$@"; }

step "$bin/ruff" check .
step "$bin/ruff" format --check .
step "$bin/lint-imports" --no-logo
step "$bin/pyrefly" check --output-format=min-text

report=$(mktemp)
trap 'rm -f "$report"' EXIT
workers=$(nproc)
status=0
step "$bin/python" -m pytest -q -n "$workers" --dist=worksteal --durations=20 --junit-xml="$report" "$@" || status=$?
"$bin/python" - "$report" <<'PY'
import sys
import xml.etree.ElementTree as xml

suite = xml.parse(sys.argv[1]).getroot().find('testsuite').attrib
skipped = suite['skipped']
print(f"\n{suite['tests']} tests, {suite['failures']} failed, {suite['errors']} errors, {skipped} skipped, {float(suite['time']):.0f} s")
PY
exit "$status"
