#!/usr/bin/env bash
# Makes .venv from the lock if it is missing or out of date; otherwise does nothing (in milliseconds).
#   ./scripts/setup.sh          packages for training
#   ./scripts/setup.sh --dev    also the test tools and libtpu, which compiles for TPUs without one
# Uses uv if it is installed (unless SETUP_WITHOUT_UV=1), otherwise python3 -m venv and pip.
# PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

locks=(requirements.lock)
case "${1:-}" in
  --dev) locks=(requirements-dev.lock) ;;  # a superset, resolved with the same versions
  '') ;;
  *) die "unknown argument $1; write ./scripts/setup.sh or ./scripts/setup.sh --dev." ;;
esac

# The lock files, and the part of setup.cfg about the package (not about tests).
hash_of() { { cat "$@"; sed '/^\[tool:pytest\]/,$d' setup.cfg; } | cksum | cut -d' ' -f1; }
runtime=$(hash_of requirements.lock) dev=$(hash_of requirements.lock requirements-dev.lock)
stamp=.venv/.installed      # what is installed: 'runtime HASH' or 'dev HASH'
busy=.venv/.installing      # exists while an installation runs; left behind by one that was killed

up_to_date() {
  local have; have=$(cat "$stamp" 2>/dev/null) || return 1
  [[ $have == "dev $dev" || ( $have == "runtime $runtime" && ${locks[0]} == requirements.lock ) ]]
}

good_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  if [[ -n ${PYTHON:-} ]]; then
    good_python "$PYTHON" || die "PYTHON=$PYTHON is not Python >= 3.11."
    echo "$PYTHON"; return
  fi
  for name in python3 python3.12 python3.11 python3.13; do
    if good_python "$name"; then echo "$name"; return; fi
  done
  die "no Python >= 3.11 found (python3 is $(python3 -V 2>&1 || true)). On Debian or Ubuntu: sudo apt install" \
    "python3.12 python3.12-venv; or name one with PYTHON=/path/to/python3.12."
}

has_uv() { [[ -z ${SETUP_WITHOUT_UV:-} ]] && uv --version >/dev/null 2>&1; }

make_venv() {
  local python=$1
  if has_uv; then
    uv venv --quiet --allow-existing --python "$python" .venv
  elif "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv .venv
  else
    die "$python has no ensurepip, so it cannot make a virtual environment. On Debian or Ubuntu: sudo apt install" \
      "python3-venv; or install uv (https://docs.astral.sh/uv)."
  fi
}

install() {
  if has_uv; then
    uv pip install --quiet --python .venv/bin/python --require-hashes -r "${locks[0]}"
    uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
  else
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet)
    "${pip[@]}" --require-hashes -r "${locks[0]}"
    "${pip[@]}" --no-deps --no-build-isolation -e .
  fi
}

# If two scripts run at once, the second waits, then finds everything done. (The lock is on this file; no lock file.)
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi

if up_to_date; then exit 0; fi
[[ ! -e .venv || -f .venv/pyvenv.cfg || -f $busy ]] ||
  die ".venv exists and is not a virtual environment; nothing was changed. Move it away."
if [[ -f $busy ]]; then
  echo 'setup: an earlier installation was cut off; starting again.' >&2
  rm -rf .venv
fi
python=$(find_python)
if ! .venv/bin/python -c '' 2>/dev/null; then
  rm -rf .venv
  mkdir .venv
  touch "$busy"
  make_venv "$python"
fi
touch "$busy"
echo "setup: installing ${locks[0]} into .venv ($(.venv/bin/python -V), $(has_uv && echo uv || echo pip)) …" >&2
install
if [[ ${locks[0]} == requirements.lock ]]; then echo "runtime $runtime"; else echo "dev $dev"; fi >"$stamp"
rm "$busy"
