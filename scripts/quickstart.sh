#!/usr/bin/env bash
# Trains a UL2 model on real English, on eight simulated devices: about five minutes on four cores.
# Run it again and it resumes; RUN=folder chooses another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
run=${RUN:-runs/quickstart}
bin=$PWD/.venv/bin

"$bin/pretrain" train --gin_file=configs/ul2/quickstart.gin --workdir="$run"
"$bin/python" scripts/baselines.py "$run"
"$bin/pretrain" report "$run"
"$bin/pretrain" generate --workdir="$run" --text='Return True if the <extra_id_0> of the given <extra_id_1>, False otherwise.'
