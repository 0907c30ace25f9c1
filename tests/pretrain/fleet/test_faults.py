"""Real processes that are killed, told to stop, or do not start. scripts/faults.py tries more of this, more often."""

import io
import os
import signal
import sys

import pytest

from pretrain.fleet import launch
from pretrain.fleet.supervise import Policy, Supervisor
from pretrain.records.metrics import read_metrics
from tests.pretrain import tiny
from tests.pretrain.fleet.test_supervise import incidents

LATE = """
import sys, time
from pretrain.fleet.launch import initialize_from_env, num_hosts
initialize_from_env()
from pretrain.hosts import coordination
coordination.barrier('all are here', 60.0)
if coordination.host() == 2:
  coordination.tell('data', 7, 1)
  coordination.barrier('told', 60.0)
  time.sleep(30)
coordination.barrier('told', 60.0)
start = time.monotonic()
try:
  coordination.barrier('saved', 2.0)
except coordination.HostError as error:
  sys.stdout.write(f'{error} after {time.monotonic() - start < 20}\\n')
  sys.stdout.flush()
import os
os._exit(70)
"""


def test_a_barrier_ends_in_time_and_names_the_missing_process():
  stream = io.StringIO()
  assert launch.Group(3, [sys.executable, '-c', LATE], stream).wait().code == 70
  said = [line for line in stream.getvalue().splitlines() if 'HANG' in line]
  assert said, stream.getvalue()
  for line in said:
    assert "HANG: process 2 has not reached the barrier 'saved' within 2 s of process" in line
    assert line.endswith('after True')
  # Whoever is second may ask when process 0, who keeps what was told, has left already.
  assert any('other processes: 2: data since step 7' in line for line in said), said


# One process or several, with their pids in files; the losses of two starts are compared bit for bit.
TRAIN = """
import os, pathlib, signal, sys, time
from pretrain.run import step_numbers
notes = pathlib.Path(sys.argv[1] + '.notes')
notes.mkdir(exist_ok=True)
(notes / os.environ['PRETRAIN_HOST']).write_text(str(os.getpid()))
log = step_numbers.log
def killed(run, step, *rest):
  log(run, step, *rest)
  if step == 15 and os.environ['PRETRAIN_HOST'] == os.environ.get('KILL') and not (notes / 'killed').exists():
    while not (run.workdir / 'checkpoints/10/MANIFEST.json').exists(): time.sleep(0.01)
    (notes / 'killed').touch()
    os.kill(os.getpid(), int(os.environ['SIGNAL']))
step_numbers.log = killed
from pretrain.cli.main import main
sys.exit(main(['train', *sys.argv[2:]]))
"""


def supervised(workdir, hosts: int, steps: int, number: int = 0, host: int | None = None) -> int:
  """The code of a run of a decoder; at step 15 process `host` gets signal `number`."""
  keys = (*tiny.SMALL_DECODER, f'train.steps={steps}', 'checkpoint.every=10', 'data.batch_size=6', 'mesh.data=3')
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={workdir}', *(f'--gin.{key}' for key in keys)]

  os.environ |= {'KILL': str(host), 'SIGNAL': str(int(number))}  # and own_devices takes them away
  command = [sys.executable, '-c', TRAIN, str(workdir), *flags]
  return Supervisor(hosts, command, workdir, Policy(), stream=io.StringIO()).run()


def numbers(workdir) -> list[tuple]:
  return [tuple(row[key] for key in ('step', 'loss', 'grad_norm', 'batch_checksum')) for row in read_metrics(workdir)]


@pytest.fixture(autouse=True)
def own_devices(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')
  monkeypatch.setenv('PYTHONPATH', str(tiny.ROOT))
  for name in ('KILL', 'SIGNAL'):
    monkeypatch.setenv(name, '')


@pytest.mark.slow
def test_a_killed_run_resumes_by_itself_with_the_losses_of_an_uninterrupted_run(tmp_path):
  assert supervised(tmp_path / 'killed', 1, 30, signal.SIGKILL, host=0) == 0
  assert supervised(tmp_path / 'alone', 1, 30) == 0
  assert numbers(tmp_path / 'killed') == numbers(tmp_path / 'alone')
  (incident,) = incidents(tmp_path / 'killed')
  assert incident['cause'] == 'killed'
  assert incident['step_resumed'] == 10, 'it did not begin anew'


@pytest.mark.slow
@pytest.mark.parametrize('host', [0, 2])
def test_one_of_three_is_killed_and_all_resume(tmp_path, host):
  assert supervised(tmp_path / 'killed', 3, 30, signal.SIGKILL, host=host) == 0
  assert supervised(tmp_path / 'alone', 3, 30) == 0
  assert numbers(tmp_path / 'killed') == numbers(tmp_path / 'alone')
  assert incidents(tmp_path / 'killed')[0]['host'] == host


@pytest.mark.slow
def test_sigterm_to_one_of_three_saves_the_same_step_in_all(tmp_path):
  assert supervised(tmp_path / 'stopped', 3, 60, signal.SIGTERM, host=1) == 75
  last = read_metrics(tmp_path / 'stopped')[-1]['step']
  assert last < 60
  assert max(int(p.name) for p in (tmp_path / 'stopped' / 'checkpoints').glob('[0-9]*')) == last
  assert incidents(tmp_path / 'stopped') == []
  assert supervised(tmp_path / 'stopped', 3, 60) == 0
  assert supervised(tmp_path / 'alone', 3, 60) == 0
  assert numbers(tmp_path / 'stopped') == numbers(tmp_path / 'alone')
