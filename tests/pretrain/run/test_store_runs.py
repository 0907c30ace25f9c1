"""Runs whose workdir is in an object store: killed, moved to another host, resumed; what is in the store afterwards."""

import json

import pytest

from pretrain.checkpoints import manifest, step_folders
from pretrain.errors import ConfigError
from pretrain.hosts import lease
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import read_timeline
from pretrain.run import step_numbers
from pretrain.run.train import train
from pretrain.workdirs.run_files import Mirrored, run_files
from pretrain.workdirs.store_path import StorePath
from tests.pretrain import tiny

EXACT = ('step', 'loss', 'grad_norm', 'batch_checksum')


@pytest.fixture(scope='module')
def cfg():
  return tiny.decoder('train.steps=12', 'checkpoint.every=4', 'checkpoint.keep=2')


@pytest.fixture(scope='module')
def on_a_disk(cfg, tmp_path_factory) -> list[tuple]:
  """What a run on a disk records, step by step; and that it leaves nothing there that a store needs."""
  workdir = tmp_path_factory.mktemp('disk') / 'run'
  assert train(cfg, workdir) == 0
  names = {path.relative_to(workdir).as_posix() for path in workdir.rglob('*') if path.is_file()}
  assert not names & {'OWNER', '.owner', '.lock'}
  assert not any(name.endswith('/') for name in names)
  return records(workdir)


def records(workdir) -> list[tuple]:
  return [tuple(row[key] for key in EXACT) for row in read_metrics(workdir)]


class Killed(BaseException):
  """The process is no more: nothing is closed, uploaded or released."""


def run_killed(monkeypatch, cfg, url: str, step: int) -> None:
  """A run that is killed after `step`."""
  log = step_numbers.log

  def dying(run, number, *rest):
    log(run, number, *rest)
    if number == step:
      run.checkpoints.poll(wait=True)  # otherwise this process, which lives on, would end the save later
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(step_numbers, 'log', dying)
    patch.setattr(Mirrored, 'close', lambda self: self._stop.set() or True)
    patch.setattr(lease._Holding, 'stop', lambda self: self._stop.set())
    patch.setattr(lease, 'machine', lambda: 'the machine that is gone')
    with pytest.raises(Killed):
      train(cfg, url)


@pytest.mark.parametrize('bucket', ['gs', pytest.param('s3', marks=pytest.mark.slow)], indirect=True)
def test_a_run_that_is_killed_resumes_on_another_host_with_the_same_bits(
  bucket, cfg, on_a_disk, monkeypatch, shared_programs
):
  monkeypatch.setattr(lease, 'LEASE_SECONDS', 0.1)
  monkeypatch.setattr(lease, 'POLL_SECONDS', 0.02)
  run_killed(monkeypatch, cfg, bucket.url, step=7)
  assert step_folders.finished(StorePath(bucket.url) / 'checkpoints') == [4]
  assert records(StorePath(bucket.url))[:4] == on_a_disk[:4]
  assert 'OWNER' in bucket.contents()
  bucket.forget_host()
  assert train(cfg, bucket.url) == 0
  run = StorePath(bucket.url)
  assert records(run) == on_a_disk
  assert step_folders.finished(run / 'checkpoints') == [8, 12]
  assert {line['resumed'] for line in read_timeline(run)} == {0, 4}
  there = bucket.contents()
  assert 'OWNER' not in there
  assert not [name for name in there if name.startswith(('checkpoints/4', 'checkpoints/.'))]
  spool = run_files(run).folder
  own = {path.relative_to(spool).as_posix(): path for path in spool.rglob('*') if path.is_file()}
  small = {name: data for name, data in there.items() if not name.startswith('checkpoints')}
  assert {
    name: path.read_bytes() for name, path in own.items() if name not in ('.owner', '.lock')
  }.items() <= small.items()
  assert len([name for name in small if name.startswith('tensorboard/')]) == 2  # one for each start


def test_a_finished_run_has_what_one_on_a_disk_has_and_mistakes_name_its_url(gcs, cfg, on_a_disk, reports):
  url = StorePath('gs://runs/some/run')
  assert train(cfg, url) == 0
  assert records(url) == on_a_disk
  found = manifest.read(url / 'checkpoints' / '12')
  assert found.step == 12
  assert all((url / 'checkpoints' / '12' / name).is_file() for name in found.files)
  assert '<h1>run</h1>' in (url / 'report.html').read_text()
  spool, there = run_files(url).folder, {name: data for (_, name), (data, _) in gcs.objects.items()}
  shown = [path for path in spool.rglob('*') if path.suffix in ('.html', '.png') or 'tfevents' in path.name]
  assert {'report.html', 'loss.png'} < {path.name for path in shown}
  assert sum('tfevents' in path.name for path in shown) == 1
  for path in shown:
    assert there[f'some/run/{path.relative_to(spool)}'] == path.read_bytes(), path
  with pytest.raises(ConfigError, match=r'is 32 in gs://runs/some/run/config\.gin, 16 in this command'):
    train(tiny.decoder('model.embed=16', 'train.steps=12', 'checkpoint.every=4'), url)


def test_a_run_that_loses_its_workdir_ends_before_it_commits(gcs, cfg, monkeypatch, shared_programs):
  log = step_numbers.log

  def stolen(run, number, *rest):
    if number == 6:
      run.checkpoints.poll(wait=True)
      StorePath('gs://runs/some/run/OWNER').write_text(json.dumps({'id': 'other', 'host': 'b', 'pid': 1, 'since': 's'}))
    log(run, number, *rest)

  monkeypatch.setattr(step_numbers, 'log', stolen)
  with pytest.raises(ConfigError, match=r'gs://runs/some/run belongs to the run of process 1 on b \(since s\) now'):
    train(cfg, 'gs://runs/some/run')
  assert step_folders.finished(StorePath('gs://runs/some/run/checkpoints')) == [4]
