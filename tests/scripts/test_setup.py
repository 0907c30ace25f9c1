"""scripts/setup.sh, with a stand-in for python3 that records what it is told to install."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = """#!/bin/bash
case "$*" in
  *version_info*) exit ${OLD:-0} ;;
  *'import ensurepip'*) exit ${NO_ENSUREPIP:-0} ;;
  '-m venv .venv') mkdir -p .venv/bin; touch .venv/pyvenv.cfg; cp "$0" .venv/bin/python ;;
  *'install'*) echo "$*" >> installs; [[ -z $FAIL ]] ;;
  -V) echo Python 3.8.1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
  """A checkout with the stand-in first on PATH, and no uv."""
  for name in ('setup.cfg', 'requirements.lock', 'requirements-dev.lock', 'scripts/setup.sh'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / name)
  (tmp_path / 'bin').mkdir()
  for name in ('python3', 'python3.11', 'python3.12', 'python3.13'):
    (tmp_path / 'bin' / name).write_text(PYTHON)
    (tmp_path / 'bin' / name).chmod(0o755)
  return tmp_path


def setup(checkout, *argv, **env):
  env = {'PATH': f'{checkout}/bin:{os.environ["PATH"]}', 'SETUP_WITHOUT_UV': '1', **env}
  return subprocess.run(
    ['./scripts/setup.sh', *argv], cwd=checkout, env=env, capture_output=True, text=True, check=False
  )


def installs(checkout):
  path = checkout / 'installs'
  return path.read_text().splitlines() if path.exists() else []


def test_it_installs_from_the_lock_with_hashes_then_does_nothing(checkout):
  assert setup(checkout).returncode == 0
  assert [line.split('--quiet ')[1] for line in installs(checkout)] == [
    '--require-hashes -r requirements.lock',
    '--no-deps --no-build-isolation -e .',
  ]
  assert setup(checkout).returncode == 0
  assert len(installs(checkout)) == 2


def test_dev_includes_what_training_needs_but_not_the_other_way(checkout):
  setup(checkout)
  setup(checkout, '--dev')
  assert '--require-hashes -r requirements-dev.lock' in installs(checkout)[2]
  setup(checkout)
  assert len(installs(checkout)) == 4, 'nothing is left to install'


def test_a_changed_lock_is_installed_again(checkout):
  setup(checkout)
  with (checkout / 'requirements.lock').open('a') as lock:
    lock.write('# changed\n')
  setup(checkout)
  assert len(installs(checkout)) == 4


def test_an_installation_that_was_cut_off_starts_again(checkout):
  assert setup(checkout, FAIL='1').returncode != 0
  (checkout / '.venv/leftover').touch()
  done = setup(checkout)
  assert done.returncode == 0
  assert 'an earlier installation was cut off' in done.stderr
  assert not (checkout / '.venv/leftover').exists()


def test_a_folder_that_is_not_an_environment_is_not_touched(checkout):
  (checkout / '.venv').mkdir()
  (checkout / '.venv/thesis.txt').touch()
  done = setup(checkout)
  assert (done.returncode, done.stderr) == (
    1,
    'setup: .venv exists and is not a virtual environment; nothing was changed. Move it away.\n',
  )
  assert (checkout / '.venv/thesis.txt').exists()


@pytest.mark.parametrize(
  ('env', 'message'),
  [
    ({'OLD': '1'}, 'setup: no Python >= 3.11 found (python3 is Python 3.8.1). On Debian or Ubuntu: sudo apt install'),
    ({'NO_ENSUREPIP': '1'}, 'setup: python3 has no ensurepip, so it cannot make a virtual environment. On Debian'),
    ({'PYTHON': '/no/python'}, 'setup: PYTHON=/no/python is not Python >= 3.11.'),
  ],
)
def test_a_missing_tool_is_reported_with_the_fix(checkout, env, message):
  done = setup(checkout, **env)
  assert done.returncode == 1
  assert done.stderr.startswith(message), done.stderr
  assert not installs(checkout)
  assert setup(checkout).returncode == 0, 'the failure leaves nothing in the way'
