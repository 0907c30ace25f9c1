"""launch/slurm.sbatch as it is shipped, on a real Slurm of two nodes."""

import os
import pathlib
import shutil
import sys

import pytest

from pretrain.fleet import launch
from pretrain.records.metrics import read_metrics
from tests.launch.local_slurm import output, two_nodes, wait_for
from tests.pretrain import tiny

STEPS = 240
KEYS = (*tiny.SMALL_DECODER, f'train.steps={STEPS}', 'checkpoint.every=50', 'mesh.data=2')


@pytest.fixture
def environ(tmp_path):
  """Variables of the jobs: no devices of the tests, no Slurm of the machine that runs the tests."""
  own = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'XLA_FLAGS', 'NPROC'))}
  more = {'PRETRAIN': str(pathlib.Path(sys.executable).parent / 'pretrain'), 'PYTHONPATH': str(tiny.ROOT)}
  return own | more | {'PRETRAIN_COORDINATOR': f'n1:{launch.free_port()}'}


def flags(workdir) -> list[str]:
  return [f'--gin_file={tiny.DECODER}', f'--workdir={workdir}', *(f'--gin.{key}' for key in KEYS)]


def numbers(workdir) -> list[tuple]:
  return [tuple(row[key] for key in ('step', 'loss', 'grad_norm', 'batch_checksum')) for row in read_metrics(workdir)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('slurmctld') is None or os.geteuid() != 0, reason='needs slurm-wlm, munge and root')
def test_a_job_that_is_told_to_stop_saves_is_requeued_and_has_the_same_losses(tmp_path, environ, monkeypatch):
  for name in set(os.environ) - set(environ):
    monkeypatch.delenv(name)
  log, run = tmp_path / 'job.log', tmp_path / 'run'
  with two_nodes(tmp_path / 'slurm') as slurm:
    variables = environ | slurm
    script = [str(tiny.ROOT / 'launch/slurm.sbatch'), *flags(run)]
    submit = ['sbatch', '--parsable', f'--output={log}', f'--chdir={tmp_path}', '--nodes=2', *script]
    job = output(submit, variables)
    assert job.isdigit(), job
    wait_for(lambda: len(read_metrics(run)) > 60, 240, tmp_path)
    output(['scancel', '--signal=TERM', f'{job}.0'], variables)  # the step alone, as Slurm preempts a job
    wait_for(lambda: 'restarts so far: 0' in log.read_text(), 120, tmp_path)
    assert 'slurm.sbatch: exit codes 75 (srun: 75)' in log.read_text()
    stopped = len(read_metrics(run))
    assert 60 < stopped < STEPS
    wait_for(lambda: 'restarts so far: 1' in log.read_text(), 480, tmp_path)  # Slurm waits two minutes
    state = output(['scontrol', 'show', 'job', job], variables)
  said = log.read_text()
  assert 'slurm.sbatch: exit codes 0 (srun: 0); restarts so far: 1 of 100' in said
  assert 'JobState=COMPLET' in state  # or COMPLETING
  assert 'Restarts=1' in state
  for process in range(2):
    assert said.count(f'2 processes by Slurm; this is {process}; coordinator {environ["PRETRAIN_COORDINATOR"]}') == 2
  monkeypatch.setenv('PYTHONPATH', str(tiny.ROOT))
  assert launch.run(2, ['train', *flags(tmp_path / 'alone')]) == 0
  assert numbers(run) == numbers(tmp_path / 'alone')
  assert len(numbers(run)) == STEPS
