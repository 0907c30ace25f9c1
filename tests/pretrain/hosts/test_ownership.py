"""One run owns a workdir: a second one is refused before it writes, whoever started either of them."""

import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from pretrain.checkpoints import step_folders
from pretrain.cli.main import main
from pretrain.errors import ConfigError
from pretrain.fleet.supervise import Supervisor
from pretrain.hosts import ownership
from pretrain.hosts.ownership import FILE, owned, owned_by_run
from pretrain.records.metrics import read_metrics
from tests.pretrain import tiny

HOLD = """
import pathlib, sys, time
from pretrain.hosts.ownership import owned
with owned(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)
"""
# A training whose steps last, until `go` is beside its workdir.
SLOW = """
import pathlib, sys, time
from pretrain.run import step_numbers
from pretrain.cli.main import main
log = step_numbers.log
def slow(run, step, *rest):
  log(run, step, *rest)
  while step == 4 and not run.workdir.with_name('go').exists(): time.sleep(0.02)
step_numbers.log = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(ownership, 'SECONDS_TO_WAIT', 0.2)


@pytest.fixture
def started():
  """`started(code, *args)`: a process, which is ended with the test."""
  processes = []

  def start(code: str, *args) -> subprocess.Popen:
    command = [sys.executable, '-c', code, *map(str, args)]
    processes.append(
      subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.wait()
    process.stdout.close()


def wait_for(condition) -> None:
  deadline = time.monotonic() + 240
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def flags(workdir, *keys: str) -> list[str]:
  keys = (*tiny.SMALL_DECODER, 'checkpoint.every=2', *keys)
  return [f'--gin_file={tiny.DECODER}', f'--workdir={workdir}', *(f'--gin.{key}' for key in keys)]


def contents(folder) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_second_owner_is_refused_with_the_host_and_process_of_the_first(tmp_path, started, impatient):
  holder = started(HOLD, tmp_path)
  assert holder.stdout.readline() == 'held\n'
  text = (
    rf'--workdir={tmp_path} belongs to the run of process {holder.pid} on {socket.gethostname()} \(since 20\d\d-.*\)'
  )
  with pytest.raises(ConfigError, match=text), owned(tmp_path):
    pass
  with pytest.raises(ConfigError, match=r'--output=.* or use another --output\.'), owned(tmp_path, '--output'):
    pass
  os.kill(holder.pid, signal.SIGKILL)
  with owned(tmp_path):  # while the kernel still ends the other one
    assert json.loads((tmp_path / FILE).read_text())['pid'] == os.getpid()
  assert list(tmp_path.iterdir()) == []


def test_a_refusal_and_an_end_leave_nothing_behind(tmp_path):
  with owned(tmp_path / 'a/b') as lock:
    assert not os.get_inheritable(lock)
    assert (tmp_path / 'a/b' / FILE).exists()
  assert list(tmp_path.iterdir()) == []
  with owned(tmp_path / 'a/b'):
    (tmp_path / 'a/b/config.gin').touch()
  assert [path.name for path in (tmp_path / 'a/b').iterdir()] == ['config.gin']


def test_a_process_of_a_run_has_inherited_its_lock_and_keeps_it_alive(tmp_path, impatient):
  """The owner dies, a process of its run does not: the workdir still belongs to the run."""
  code = (
    'import os, pathlib, sys, time; from pretrain.hosts.ownership import owned_by_run\n'
    'with owned_by_run(pathlib.Path(sys.argv[1])):\n  print("in", flush=True)\n  time.sleep(600)'
  )
  with owned(tmp_path) as lock:
    env = os.environ | {ownership.INHERITED: str(lock)}
    command = [sys.executable, '-c', code, tmp_path]
    child = subprocess.Popen(command, cwd=tiny.ROOT, env=env, pass_fds=[lock], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'in\n'
  with pytest.raises(ConfigError, match='belongs to the run of process'), owned(tmp_path):
    pass
  child.kill()
  child.wait()
  child.stdout.close()
  with owned(tmp_path):
    pass


def test_the_number_of_another_file_is_no_lock(tmp_path, monkeypatch, started, impatient):
  assert started(HOLD, tmp_path / 'run').stdout.readline() == 'held\n'
  with (tmp_path / 'other').open('w') as other:
    monkeypatch.setenv(ownership.INHERITED, str(other.fileno()))
    with pytest.raises(ConfigError, match='belongs to'), owned_by_run(tmp_path / 'run'):
      pass


def test_an_owner_that_removes_the_file_between_open_and_lock_is_noticed(tmp_path, monkeypatch):
  """Else two runs would hold the locks of two files of one name."""
  flock, calls = fcntl.flock, []

  def first_loses_its_name(lock, how):
    if not calls:
      (tmp_path / FILE).unlink()
    calls.append(lock)
    flock(lock, how)

  monkeypatch.setattr(fcntl, 'flock', first_loses_its_name)
  with owned(tmp_path) as lock:
    assert os.path.samestat(os.fstat(lock), (tmp_path / FILE).stat())


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys, number):
  def refuse(lock, how):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with owned(tmp_path):
    said = capsys.readouterr().err
  assert said.startswith(f'LOCK: the file system of {tmp_path} has no locks ({os.strerror(number)}): a second run')
  assert said.count('\n') == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
  (tmp_path / 'file').touch()
  text = r'--workdir=.*/file/run cannot be written \(.*\). Nothing was changed'
  with pytest.raises(ConfigError, match=text), owned(tmp_path / 'file/run'):
    pass


def test_a_training_is_refused_while_another_one_runs_and_readers_are_not(
  tmp_path, started, impatient, capsys, shared_programs
):
  """The first keeps every row and step; the second resumes where the first was killed."""
  run = tmp_path / 'run'
  first = started(SLOW, 'train', *flags(run, 'train.steps=6'))
  wait_for(lambda: first.poll() is not None or len(read_metrics(run)) == 4)
  wait_for(lambda: step_folders.finished(run / 'checkpoints') == [2])
  time.sleep(1.5)  # the watchdog's last line of the timeline
  before = contents(run)
  assert main(['train', *flags(run, 'train.steps=6')]) == 64
  err = capsys.readouterr().err
  assert re.fullmatch(
    rf'CONFIG: --workdir={run} belongs to the run of process {first.pid} on .* \(since .*\), which has not ended. '
    r'Nothing was changed; wait for its end, stop it, or use another --workdir.\n',
    err,
  ), err
  unchanged = {path: data for path, data in contents(run).items() if not path.endswith('timeline.jsonl')}
  assert unchanged == {path: data for path, data in before.items() if not path.endswith('timeline.jsonl')}
  assert main(['run', '--hosts=2', '--', 'train', *flags(run, 'train.steps=6')]) == 64
  assert 'belongs to the run of process' in capsys.readouterr().err
  assert main(['report', str(run)]) == 0
  assert main(['replay', f'--workdir={run}', '--step=4']) == 0
  first.kill()
  first.wait()  # its lock is free when the kernel has ended it
  assert main(['train', *flags(run, 'train.steps=6')]) == 0
  assert [row['step'] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
  assert not (run / FILE).exists()


@pytest.mark.slow
def test_two_processes_of_one_run_share_a_workdir_through_a_restart_and_refuse_others(tmp_path, impatient, monkeypatch):
  """Process 1 dies once; meanwhile, and before and after, no other run gets in."""
  run = tmp_path / 'run'
  code = (
    'import os, pathlib, signal, sys; from pretrain.run import step_numbers; from pretrain.cli.main import main\n'
    'from pretrain.hosts import ownership\n'
    'log, note = step_numbers.log, pathlib.Path(sys.argv[1])\n'
    'def dying(run, step, *rest):\n'
    '  log(run, step, *rest)\n'
    '  if step == 3 and os.environ["PRETRAIN_HOST"] == "1" and not note.exists():\n'
    '    note.touch()\n'
    '    os.kill(os.getpid(), signal.SIGKILL)\n'
    'step_numbers.log = dying\n'
    'sys.exit(main(sys.argv[2:]))'
  )
  command = [sys.executable, '-c', code, str(tmp_path / 'died'), 'train', *flags(run, 'train.steps=6', 'mesh.data=2')]
  tried = []
  wait = Supervisor._report

  def between(self, *args):
    tried.append(main(['train', *flags(run, 'train.steps=6')]))
    wait(self, *args)

  monkeypatch.setattr(Supervisor, '_report', between)
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=1')
  from pretrain.fleet.supervise import Policy

  assert Supervisor(2, command, run, Policy(max_restarts=2)).run() == 0
  assert tried == [64], 'between two starts the run still owns its workdir'
  assert [row['step'] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
  assert not (run / FILE).exists()


def test_what_writes_a_new_workdir_respects_its_owner(tmp_path, impatient):
  """`checkpoints average`, `soup`, `merge` and `restore-as` write through these two functions."""
  import types

  from pretrain.tools import rewrite, weights

  held = pathlib.Path(tmp_path / 'out')
  with owned(held):
    with pytest.raises(ConfigError, match=r'--output=.* belongs to the run of process .* use another --output'):
      weights._write(held, {}, tiny.decoder(), types.SimpleNamespace(tokenizer=lambda: None), 'a test')
    with pytest.raises(ConfigError, match=r'--output=.* belongs to the run of process'):
      rewrite._write(held, 1, None, {}, '')
    assert [path.name for path in held.iterdir()] == [FILE]
