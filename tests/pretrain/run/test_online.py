"""Runs that mix their sources online: killed and resumed, and on another mesh, they decide the same."""

import dataclasses
import json

import numpy as np
import pytest

import pretrain.run.train
from data.stores.store import StoreWriter
from data.stores.vocabulary import Tokenizer
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.cli import main
from pretrain.errors import ConfigError
from pretrain.records.metrics import Metrics, read_metrics
from pretrain.run.train import train
from pretrain.snapshots.snapshots import Snapshots
from tests.pretrain import tiny
from tests.pretrain.hosts.test_hosts import XLA_FLAGS

pytestmark = pytest.mark.usefixtures('shared_programs')

KEYS = ('loss', 'batch_checksum', 'weight/a', 'weight/b', 'weight/c', 'share/a', 'epochs/c')


@pytest.fixture(scope='module')
def stores(tokenizer_model, tmp_path_factory):
  """Three stores, of which one is easier than the others, and one easier still."""
  folder, rng = tmp_path_factory.mktemp('unequal'), np.random.default_rng(0)
  for name, last in (('a', 400), ('b', 40), ('c', 6)):
    with StoreWriter(folder / name, Tokenizer(tokenizer_model, 32)) as writer:
      writer.add([rng.integers(3, last, rng.integers(20, 90)) for _ in range(200)])
      writer.finish()
  return folder


def overrides(stores, *more: str) -> tuple[str, ...]:
  listed = ', '.join(f"{{'path': '{stores}/{name}'}}" for name in 'abc')
  return (
    *tiny.SMALL_DECODER, "data.name='store'", f'data.sources=[{listed}]', 'data.sentinels=32', 'checkpoint.every=4',
    'schedule.peak=3e-2', 'schedule.warmup_steps=0', 'data.online.every=3', 'train.steps=11', *more,
  )  # fmt: skip


def mixture_of(workdir, step: int):
  return json.loads((workdir / f'checkpoints/{step}/position/metadata').read_text())['loader']['mixture']


def configured(stores, *more: str):
  return tiny.experiment(tiny.DECODER, *overrides(stores, *more))


def rows_of(workdir, keys=KEYS) -> list[tuple[float, ...]]:
  return [tuple(row[key] for key in keys) for row in read_metrics(workdir)]


@pytest.fixture(scope='module')
def whole(stores, tmp_path_factory):
  """The rows of a run in one go."""
  workdir = tmp_path_factory.mktemp('whole')
  train(configured(stores), workdir)
  return workdir


def test_weights_follow_the_losses_from_the_first_decision_on(whole):
  weights = np.array(rows_of(whole, ('weight/a', 'weight/b', 'weight/c')))
  assert (weights[:3] == 1 / 3).all()
  assert all((weights[i] == weights[i - 1]).all() == (i % 3 != 0) for i in (4, 5, 6, 7, 8, 9, 10))
  assert weights[10, 0] > weights[10, 2] + 0.1, 'more of what is harder'
  assert np.allclose(weights * 24, np.round(weights * 24)), 'whole rows of an interval'


class Killed(BaseException):
  pass


def killed_at(cfg, workdir, step: int, monkeypatch) -> None:
  """Runs until it would write the row of `step`, one or two steps later; what it saved is on disk."""
  with monkeypatch.context() as patch:
    write, save = Metrics.write, Checkpoints.save

    def killed(self, number, values):
      if number == step:
        raise Killed
      write(self, number, values)

    def save_and_wait(self, *what):
      save(self, *what)
      self.finished()

    patch.setattr(Metrics, 'write', killed)
    patch.setattr(Checkpoints, 'save', save_and_wait)
    with pytest.raises(Killed):
      train(cfg, workdir)


def test_a_killed_run_resumes_bit_exactly_across_decisions(stores, whole, tmp_path, monkeypatch, shared_programs):
  """From steps 4 (between two decisions), 6 (at one) and 8 (beyond another), with decisions after 3, 6 and 9."""
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  killed_at(configured(stores), tmp_path, 5, monkeypatch)
  train(configured(stores, 'train.steps=6'), tmp_path)
  killed_at(configured(stores), tmp_path, 10, monkeypatch)
  assert len(rows_of(tmp_path)) == 9
  train(configured(stores), tmp_path)
  assert rows_of(tmp_path) == rows_of(whole)
  assert mixture_of(tmp_path, 11) == mixture_of(whole, 11), 'to the last bit of what later decisions hang on'


def test_a_run_resumes_from_host_ram_bit_exactly_across_decisions(
  stores, whole, tmp_path, monkeypatch, capsys, shared_programs
):
  """From step 5, whose losses count for the next decision, and are known when step 6 is under way."""
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  own = ('checkpoint.every=1000', 'snapshot.every=5', f"snapshot.folder='{tmp_path}'")
  recorded = Snapshots.recorded

  def record_and_wait(self, *what):
    recorded(self, *what)
    if self._taking is not None and self._taking.known.is_set():
      self._taking._thread.join()

  with monkeypatch.context() as patch:
    patch.setattr(Snapshots, 'recorded', record_and_wait)
    killed_at(configured(stores, *own), tmp_path / 'run', 8, monkeypatch)
  train(configured(stores, *own), tmp_path / 'run')
  assert 'SNAPSHOT: resuming from step 5 in host RAM' in capsys.readouterr().err
  assert rows_of(tmp_path / 'run') == rows_of(whole)
  assert mixture_of(tmp_path / 'run', 11) == mixture_of(whole, 11)


@pytest.mark.slow
def test_another_mesh_decides_the_same(stores, whole, tmp_path, monkeypatch):
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  train(configured(stores, 'mesh.data=2', 'mesh.fsdp=4'), tmp_path)
  assert rows_of(tmp_path, KEYS[1:]) == rows_of(whole, KEYS[1:])


@pytest.mark.slow
def test_two_hosts_decide_what_one_does(stores, whole, tmp_path, monkeypatch, capfd):
  keys = [f'--gin.{key}' for key in overrides(stores, 'mesh.data=2', 'mesh.fsdp=1')]
  with monkeypatch.context() as patch:
    patch.setenv('XLA_FLAGS', XLA_FLAGS)
    command = ['train', f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path}', *keys]
    assert main.main(['run', '--hosts=2', '--', *command]) == 0, capfd.readouterr()
  assert rows_of(tmp_path, KEYS[1:]) == rows_of(whole, KEYS[1:])


def test_phases_may_change_the_objective_but_not_the_data(stores, tmp_path, monkeypatch, shared_programs):
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  phase = "phases=[{'start_step': 4, 'set': {'%s': %s}}]"
  cfg = configured(stores, phase % ('loss.z_loss', '1e-3'))
  train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=7)), tmp_path)
  weights = rows_of(tmp_path, ('weight/a', 'weight/b', 'weight/c'))
  assert weights[3] == weights[4] == weights[5] != weights[6], 'the decided weights stay in the next phase'
  with pytest.raises(ConfigError, match=r'from step 4 on data.batch_size changes the data, and data.online decides'):
    configured(stores, phase % ('data.batch_size', '16'))


def test_rows_that_a_run_decides_are_not_shown_without_it(stores, capsys):
  keys = [f'--gin.{key}' for key in overrides(stores)]
  command = ['data', 'explain', f'--gin_file={tiny.DECODER}', *keys]
  assert main.main([*command, '--step=2']) == 0
  assert main.main([*command, '--step=3']) == 64
  assert 'give a step before 3' in capsys.readouterr().err


def test_a_position_is_json_with_the_decided_weights(whole):
  mixture = mixture_of(whole, 8)
  assert mixture['start'] == 48
  assert mixture['steps'] == 6
  assert sum(mixture['used'].values()) == 48
  assert sum(mixture['weights']) == 24
  assert all(value > 0 for key in ('rewards', 'loss', 'tokens') for value in mixture[key])
