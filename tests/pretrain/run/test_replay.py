"""Replayed steps are equal to the record of a sound run; where they differ, the step and the array are named."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

import pretrain.run.train
from pretrain.checkpoints import manifest
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.run import step_numbers
from pretrain.run.replay import Earlier
from pretrain.run.train import train
from tests.pretrain import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')

KEYS = ('train.steps=9', 'checkpoint.every=3', 'checkpoint.keep=2', 'mesh.data=2', 'model.dropout=0.1')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """'sound', and 'flipped': one bit of a parameter changed after step 7, undetected."""
  folder = tmp_path_factory.mktemp('runs')
  after = step_numbers.numbers_of  # what is called after each step

  def flipping(run, *rest):
    if run.step == 7 and run.workdir.name == 'flipped':
      params = run.state.params
      bits = params['head']['kernel'].view(jnp.uint32).at[3, 5].add(1)
      params = params | {'head': {'kernel': bits.view(jnp.float32)}}
      run.state = dataclasses.replace(run.state, params=params)
    return after(run, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretrain.run.train, 'write_report', lambda _: None)
    patch.setattr(step_numbers, 'numbers_of', flipping)
    for name in ('sound', 'flipped'):
      train(tiny.decoder(*KEYS), folder / name)
  return folder


def replay(capsys, workdir, *flags) -> tuple[int, list[str], str]:
  code = main(['replay', f'--workdir={workdir}', *flags])
  out = capsys.readouterr()
  return code, out.out.splitlines(), out.err


def contents(workdir) -> dict[str, bytes]:
  return {str(p): p.read_bytes() for p in workdir.rglob('*') if p.is_file()}


def test_steps_of_a_sound_run_are_equal_and_nothing_is_written(runs, capsys):
  before = contents(runs / 'sound')
  code, lines, _ = replay(capsys, runs / 'sound', '--step=9')
  assert code == 0
  assert [line.split(' loss')[0] for line in lines] == [
    'replaying steps 7 to 9 from step 6', 'step 7  equal   ', 'step 8  equal   ', 'step 9  equal   ',
    'step 9  equal    41 arrays of checkpoints/9', 'equal',
  ]  # fmt: skip
  assert contents(runs / 'sound') == before


def test_a_replay_keeps_the_snapshots_of_the_run(tmp_path, monkeypatch, capsys, shared_programs):
  """A run that was killed and then replayed can still resume from host RAM."""
  (tmp_path / 'memory').mkdir()
  keys = ('snapshot.every=2', f"snapshot.folder='{tmp_path / 'memory'}'")
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  monkeypatch.setattr(pretrain.run.train, 'finish', lambda run: run.checkpoints.close())  # nothing is tidied
  train(tiny.decoder(*KEYS, *keys), tmp_path / 'run')
  before = contents(tmp_path / 'memory')
  assert before
  assert replay(capsys, tmp_path / 'run', '--step=9')[0] == 0
  assert contents(tmp_path / 'memory') == before


def test_without_an_older_checkpoint_it_starts_at_step_0(runs, capsys):
  """Step 3 has been removed. Step 6 is compared, so the replay cannot start from it."""
  code, lines, _ = replay(capsys, runs / 'sound', '--step=6')
  assert (code, lines[0]) == (0, 'replaying steps 1 to 6 from the beginning')
  assert lines[-2] == 'step 6  equal    41 arrays of checkpoints/6'


def test_a_bit_that_flipped_is_found_at_the_first_step_after_it(runs, capsys):
  code, lines, _ = replay(capsys, runs / 'flipped', '--step=9')
  assert code == 66
  assert lines[1].startswith('step 7  equal')
  wrong = [line for line in lines if 'DIFFERS  ' in line]
  assert wrong
  assert wrong[-1].startswith('step 9  DIFFERS  params/')
  assert 'is not that of checkpoints/9 (first of' in wrong[-1]
  assert lines[-1].startswith('DIFFERS: a device has computed wrongly, then or now; or')


@pytest.fixture
def copy(runs, tmp_path):
  shutil.copytree(runs / 'sound', tmp_path / 'run')
  return tmp_path / 'run'


def test_the_record_is_compared(copy, capsys):
  """One number of step 8, one array of step 9."""
  path = copy / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[7]['loss'] += 1e-6
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  folder = copy / 'checkpoints/9'
  written = manifest.read(folder)
  key = 'params/decoder/blocks/mlp/up'
  leaves = written.leaves | {key: dataclasses.replace(written.leaves[key], digest='0' * 16)}
  manifest.write(folder, dataclasses.replace(written, leaves=leaves))
  code, lines, _ = replay(capsys, copy, '--step=9')
  assert code == 66
  assert [line.split('  ')[:2] for line in lines[1:-1]] == [
    ['step 7', 'equal'], ['step 8', 'DIFFERS'], ['step 9', 'equal'], ['step 9', 'DIFFERS']
  ]  # fmt: skip
  assert lines[2].split('  ')[2] == f'loss is {rows[7]["loss"] - 1e-6!r}, {rows[7]["loss"]!r} in metrics.jsonl'
  assert lines[4].split('  ')[2] == f'{key} is not that of checkpoints/9'
  code, lines, _ = replay(capsys, copy, '--step=9', '--rtol=1e-5')
  assert code == 0, 'within the tolerance, and no array is compared'


def test_all_processes_start_from_a_step_that_is_whole_for_all(runs, monkeypatch):
  """Each process reads its share of the files; damage that one of them finds counts for all."""
  earlier = Earlier(runs / 'sound', CheckpointConfig(), 9)
  assert earlier.newest_whole() == 6
  monkeypatch.setattr(earlier._agreement, 'gather', lambda own: [own, 'a flipped bit'])
  assert earlier.newest_whole() is None
  earlier.close()


def test_another_mesh_is_compared_within_a_tolerance(runs, capsys):
  flags = ('--step=9', '--gin.mesh.data=1')
  code, _, said = replay(capsys, runs / 'sound', *flags)
  assert code == 64
  assert 'only the mesh of the run gives its bits; give --rtol, e.g. --rtol=1e-5.' in said
  assert replay(capsys, runs / 'sound', *flags, '--rtol=1e-5')[0] == 0


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--step=99'], 'has neither a row of metrics.jsonl nor a checkpoint of it; its last row is of step 9.'),
    (['--step=0'], '--step=0: '),
    (['--step=9', '--gin.seed=3'], '--gin.seed=3 would be another run; replay takes mesh.* alone.'),
    (['--step=9', '--workdir=nowhere'], ' is not a run: it has no config.gin; check the path.'),
  ],
)
def test_a_step_that_cannot_be_replayed_is_refused(runs, capsys, flags, message):
  code, _, said = replay(capsys, runs / 'sound', *flags)
  assert code == 64
  assert message in said
