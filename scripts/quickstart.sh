#!/usr/bin/env bash
# Trains a UL2 model on real English, on eight simulated devices: about six minutes on four cores.
# Run it again and it resumes from its last checkpoint; RUN=folder chooses another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
run=${RUN:-runs/quickstart}
bin=$PWD/.venv/bin

"$bin/pretrain" train --gin_file=configs/ul2/quickstart.gin --workdir="$run"
"$bin/python" scripts/baselines.py "$run"
"$bin/pretrain" report "$run"
echo
"$bin/python" scripts/blanks.py "$run"
echo
echo "Next: pretrain train --gin_file=configs/ul2/tiny.gin --workdir=runs/tiny learns far more in an hour; for your own text see docs/concepts.md#your-own-text."
