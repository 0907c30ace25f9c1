"""Several processes train what one process trains: the same batches, losses and checkpoints."""

import os
import subprocess
import sys

import numpy as np
import pytest

import pretrain.run.train
from pretrain.checkpoints import manifest
from pretrain.checkpoints.saving import owner
from pretrain.cli import main
from pretrain.records.metrics import read_metrics
from tests.pretrain import tiny

RUN = (
  'evaluation.every=4', 'evaluation.batches=2', 'checkpoint.every=4', 'mesh.fsdp=2', "averaging.name='ema'",
  'averaging.decay=0.5',
)  # fmt: skip
SMALL_UL2R = (
  *tiny.SMALL_DECODER, "objective.name='ul2r'", 'data.targets_length=64', 'data.sentinels=32', 'mesh.data=1'
)  # fmt: skip
MODELS = {
  'encoder_decoder': (tiny.UL2, tiny.SMALL_UL2),
  'decoder': (tiny.DECODER, SMALL_UL2R),
  'encoder': (tiny.ENCODER, tiny.SMALL_ENCODER),
}
SLOW = [pytest.param(model, marks=pytest.mark.slow) for model in ('encoder_decoder', 'encoder')]
# For processes that start with these flags: none of the devices of tests/conftest.py.
XLA_FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def overrides(model: str, store) -> tuple[str, ...]:
  """The smallest UL2 run of a model, over `store`."""
  return (*tiny.over(store), *MODELS[model][1])


def flags(model: str, store, workdir, *more: str) -> list[str]:
  """The same on a command line."""
  keys = [f'--gin.{key}' for key in (*overrides(model, store), *more)]
  return ['train', f'--gin_file={MODELS[model][0]}', f'--workdir={workdir}', *keys]


def series(workdir, key: str) -> dict[int, float]:
  """step -> value, of the rows that have `key`."""
  return {row['step']: row[key] for row in read_metrics(workdir) if key in row}


@pytest.mark.slow
@pytest.mark.parametrize('model', [*SLOW, 'decoder'])
def test_two_hosts_train_like_one_and_one_host_resumes(model, text_store, tmp_path, monkeypatch, capfd):
  command = flags(model, text_store, tmp_path / 'two', *RUN, 'train.steps=4')
  with monkeypatch.context() as patch:
    patch.setenv('XLA_FLAGS', XLA_FLAGS)
    assert main.main(['run', '--hosts=2', '--', *command]) == 0, capfd.readouterr()
  written = manifest.read(tmp_path / 'two/checkpoints/4')
  assert {owner(name) for name in written.files} == {0, 1}, 'each process has hashed what it wrote'
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)  # a third of the time, and tested elsewhere
  cfg = tiny.experiment(MODELS[model][0], *overrides(model, text_store), *RUN, 'train.steps=6')
  pretrain.run.train.train(cfg, tmp_path / 'one')
  assert_alike(tmp_path, steps=4)
  pretrain.run.train.train(cfg, tmp_path / 'two')
  assert_alike(tmp_path, steps=6)


def assert_alike(folder, steps: int) -> None:
  """The first steps of the runs `two` and `one` have equal batches, bit for bit, and equal losses."""
  bars = {'batch_checksum': 0, 'loss': 1e-5, 'grad_norm': 1e-5, 'eval/license/loss': 1e-5, 'eval/license/targets': 0}
  bars['eval/license/ema/loss'] = 1e-5
  for key, rtol in bars.items():
    two, one = series(folder / 'two', key), series(folder / 'one', key)
    assert list(two) == ([step for step in (4, 6) if step <= steps] if 'eval' in key else list(range(1, steps + 1)))
    np.testing.assert_allclose(list(two.values()), [one[step] for step in two], rtol=rtol, err_msg=key)


@pytest.mark.slow
def test_hosts_whose_rows_lie_apart_train_like_one(text_store, tmp_path, monkeypatch, capfd):
  """Three hosts of two devices: the second feeds the first and the last third of each batch."""
  keys = ('mesh.tensor=2', 'mesh.expert=3', 'data.batch_size=6', 'evaluation.every=2', 'train.steps=4')
  with monkeypatch.context() as patch:
    patch.setenv('XLA_FLAGS', XLA_FLAGS)
    command = flags('decoder', text_store, tmp_path / 'three', *keys)
    assert main.main(['run', '--hosts=3', '--', *command]) == 0, capfd.readouterr()
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  alone = ('mesh.tensor=1', 'mesh.expert=1')
  cfg = tiny.experiment(MODELS['decoder'][0], *overrides('decoder', text_store), *keys, *alone)
  pretrain.run.train.train(cfg, tmp_path / 'one')
  for key, rtol in {'batch_checksum': 0, 'loss': 1e-5, 'eval/license/loss': 1e-5}.items():
    three, one = (list(series(tmp_path / name, key).values()) for name in ('three', 'one'))
    assert len(three) in (2, 4)
    np.testing.assert_allclose(three, one, rtol=rtol, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize('process', [0, 1])
def test_two_hosts_reject_a_damaged_step_and_resume_from_the_same_one(
  process, text_store, tmp_path, monkeypatch, capfd
):
  """Whichever process reads the damage: the losses equal those of the run before."""
  monkeypatch.setenv('XLA_FLAGS', XLA_FLAGS)
  command = flags('decoder', text_store, tmp_path, *RUN, 'checkpoint.every=2', 'train.steps=4')
  assert main.main(['run', '--hosts=2', '--', *command]) == 0, capfd.readouterr()
  before, folder = series(tmp_path, 'loss'), tmp_path / 'checkpoints/4'
  names = sorted(manifest.read(folder).files)[process::2]  # each reads every second file
  name = max(names, key=lambda name: (folder / name).stat().st_size)
  (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b'?')
  assert main.main(['run', '--hosts=2', '--', *command]) == 0, capfd.readouterr()
  out = capfd.readouterr()
  assert (out.out + out.err).count('Quarantined as 4.corrupt; resuming from step 2.') == 1
  assert series(tmp_path, 'loss') == before
  assert sorted(path.name for path in folder.parent.iterdir()) == ['2', '4', '4.corrupt']


@pytest.mark.slow
def test_the_compiler_replicates_nothing_to_change_a_sharding(text_store, tmp_path):
  """In a process of its own: the partitioner's warning is written by C++, and only when it compiles."""
  mesh = ('mesh.fsdp=4', 'mesh.tensor=2', 'train.steps=1', 'evaluation.every=1', 'evaluation.batches=1')
  command = [sys.executable, '-m', 'pretrain', *flags('encoder_decoder', text_store, tmp_path / 'run', *mesh)]
  env = os.environ | {'XLA_FLAGS': XLA_FLAGS, 'PRETRAIN_CACHE': str(tmp_path / 'cache')}
  done = subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'Involuntary full rematerialization' not in done.stderr
