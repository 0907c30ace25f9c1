"""Three real processes: one is killed and its host's snapshots are lost; the others rebuild them, and all resume."""

import io
import os
import sys

import pytest

from pretrain.fleet.supervise import Policy, Supervisor
from pretrain.records.metrics import read_metrics
from tests.pretrain import tiny
from tests.pretrain.fleet.test_supervise import incidents

# At step 13 process 1 removes its host's memory and dies: step 10 was in it.
TRAIN = """
import os, pathlib, shutil, signal, sys
from pretrain.run import step_numbers
notes = pathlib.Path(sys.argv[1] + '.notes')
notes.mkdir(exist_ok=True)
log = step_numbers.log
def killed(run, step, *rest):
  log(run, step, *rest)
  taking = run.snapshots._taking
  if step % 5 == 0 and taking is not None:  # else a slow machine leaves step 10 out: 5 is still being written
    taking._thread.join()
  lost = int(os.environ['LOST'] or -1)
  if step == 13 and run.snapshots._host == lost and not (notes / 'lost').exists():
    (notes / 'lost').touch()
    shutil.rmtree(run.snapshots._slots.folder)
    os.kill(os.getpid(), signal.SIGKILL)
step_numbers.log = killed
from pretrain.cli.main import main
sys.exit(main(['train', *sys.argv[2:]]))
"""


def supervised(workdir, lost: int | str, *overrides: str) -> tuple[int, str]:
  """(exit code, output) of a run of three processes that loses host `lost`."""
  (workdir.parent / 'memory').mkdir(exist_ok=True)
  keys = (
    *tiny.SMALL_DECODER, 'model.embed=48', 'train.steps=20', 'checkpoint.every=1000', 'data.batch_size=6',
    'snapshot.every=5', 'snapshot.group=3', f"snapshot.folder='{workdir.parent}/memory'", *overrides,
  )  # fmt: skip
  os.environ['LOST'] = str(lost)
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={workdir}', *(f'--gin.{key}' for key in keys)]
  command, said = [sys.executable, '-c', TRAIN, str(workdir), *flags], io.StringIO()
  return Supervisor(3, command, workdir, Policy(), stream=said).run(), said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(('lost', 'mesh'), [(1, 'mesh.data=3'), (0, 'mesh.fsdp=3')])
def test_a_host_that_is_lost_with_its_ram_is_rebuilt_from_the_others(tmp_path, monkeypatch, lost, mesh):
  """With data parallelism every host has the whole state and keeps a third of it; with fsdp it has only its third."""
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')
  monkeypatch.setenv('PYTHONPATH', str(tiny.ROOT))
  monkeypatch.setenv('LOST', '')
  code, said = supervised(tmp_path / 'run', lost, mesh)
  assert code == 0, said
  others = [host for host in range(3) if host != lost]
  assert (
    'SNAPSHOT: resuming from step 10 in host RAM, there is no checkpoint; the share of process '
    f'{lost} is rebuilt from parity on {others}.'
  ) in said
  (incident,) = incidents(tmp_path / 'run')
  assert (incident['host'], incident['step_resumed']) == (lost, 10)
  code, said = supervised(tmp_path / 'alone', '', mesh, 'snapshot.every=0', 'snapshot.group=0', 'snapshot.folder=None')
  assert code == 0, said
  assert rows(tmp_path / 'run') == rows(tmp_path / 'alone')
  assert list((tmp_path / 'memory').iterdir()) == []


def rows(workdir):
  return [tuple(row[key] for key in ('step', 'loss', 'grad_norm', 'batch_checksum')) for row in read_metrics(workdir)]
