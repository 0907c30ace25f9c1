"""F5: whatever happens to a file of a checkpoint, no run loads it."""

import subprocess
import sys

import pytest

from pretrain.checkpoints import manifest
from scripts.faults.files import CLASSES, run_trials, write_run
from tests.pretrain import tiny


@pytest.fixture(autouse=True)
def without_orbax_alone(monkeypatch):
  """Failed reads leave pending ones behind, which the garbage collection of a later test would report."""
  monkeypatch.setattr('scripts.faults.files.orbax_alone', lambda workdir, wanted: 'not asked')


def missed(tallies) -> int:
  return sum(tally.missed for tally in tallies.values())


def test_no_damaged_file_is_loaded(tmp_path):
  tallies = run_trials(tmp_path, trials=24, seed=0)
  assert sum(tally.trials for tally in tallies.values()) == 24
  assert missed(tallies) == 0


def test_every_file_of_a_step_belongs_to_a_class(tmp_path):
  write_run(tmp_path)
  step = tmp_path / 'checkpoints/2'
  files = {path for path in step.rglob('*') if path.is_file()}
  assert files == {path for pattern in CLASSES.values() for path in step.glob(pattern) if path.is_file()}


def test_other_values_of_the_older_step_are_detected(tmp_path, monkeypatch):
  monkeypatch.setattr('scripts.faults.files.same', lambda found, wanted: False)
  assert missed(run_trials(tmp_path, trials=2, seed=0)) == 2


@pytest.mark.parametrize('skipped', ['ocdbt.process_0', pytest.param('metadata', marks=pytest.mark.slow)])
def test_the_trials_detect_a_class_of_files_that_is_not_compared(tmp_path, monkeypatch, skipped):
  compare = manifest.damage
  keep = lambda names: [name for name in names if skipped not in name]
  monkeypatch.setattr(manifest, 'damage', lambda folder, written, names: compare(folder, written, keep(names)))
  assert missed(run_trials(tmp_path, trials=24, seed=0)) > 0


@pytest.mark.slow
def test_orbax_alone_would_have_loaded_some():
  command = [sys.executable, '-m', 'scripts.faults.files', '--trials=40']
  done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=True)
  last = done.stdout.splitlines()[-1]
  assert last.startswith('F5 all         40 tried, 0 loaded; Orbax alone: silent ')
  assert 'silent 0,' not in last
