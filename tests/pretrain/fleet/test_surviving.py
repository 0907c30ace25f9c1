"""Processes that survive another one: they continue, or all are restarted; none waits for ever."""

import io
import json
import os
import random
import signal
import socket
import sys

import pytest
from orbax.checkpoint._src.futures import signaling_client, synchronization

from pretrain.checkpoints import orbax_files
from pretrain.cli import main
from pretrain.fleet import supervise
from pretrain.fleet.supervise import Policy, Supervisor
from pretrain.fleet.surviving import Coordinator, hang_up
from pretrain.records.goodput import goodput
from pretrain.records.timeline import read_timeline
from tests.pretrain import tiny
from tests.pretrain.fleet.test_faults import TRAIN, numbers
from tests.pretrain.fleet.test_supervise import incidents

# A process that makes ten steps, of which those of a dead one are made again, and hears of deaths as a run does.
# `plan`: number of a start -> {host: (step, signal)}: at that step the process sends itself that.
CHILD = """
import json, os, pathlib, sys, time
from pretrain.fleet import launch
from pretrain.fleet.surviving import News
from pretrain.records.timeline import Timeline
workdir, plan, deaf = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == 'deaf'
began, place = None, {key: int(os.environ[name]) for key, name in (('host', launch.HOST), ('hosts', launch.NUM_HOSTS))}
address = os.environ[launch.COORDINATOR]
while True:
  news = News(pathlib.Path(os.environ[launch.SERVED]), address, lambda port: None)
  host = place['host']
  (workdir / f'up_{address}_{host}_{os.getpid()}').touch()
  while len(list(workdir.glob(f'up_{address}_*'))) < place['hosts']: time.sleep(0.01)
  number = len({path.name.split('_')[1] for path in workdir.glob('up_*')}) - 1
  at, what = plan.get(str(number), {}).get(str(host), (None, 0))
  if at is None and what: os.kill(os.getpid(), what)
  while any(at is None for at, _ in plan.get(str(number), {}).values()): time.sleep(0.1)  # no state yet
  timeline = Timeline(began)
  if host == 0: timeline.open(workdir, 0)
  for step in range(1, 11):
    timeline.enter('step')
    if step == at:
      while not any('began' in l for l in map(json.loads, (workdir / 'timeline.jsonl').open())): time.sleep(0.01)
      time.sleep(0.1)
      os._exit(-what) if what < 0 else os.kill(os.getpid(), what)
    if news.wait(0.03): break
    timeline.completed(step, 8 * step)
    if plan.get(str(number)): time.sleep(0.2)
  if (found := news.wait(0)) is None: break
  timeline.flush()  # as a run does that ends
  if deaf: time.sleep(60)
  place, began = found, time.time()
  address = place['coordinator']
timeline.enter('done')
timeline.flush()
"""


def run(workdir, plan, *, hosts=3, mode='hears', **policy) -> int:
  command = [sys.executable, '-c', CHILD, str(workdir), json.dumps(plan), mode]
  return Supervisor(hosts, command, workdir, Policy(**{'survive': 30.0, **policy}), stream=io.StringIO()).run()


def ups(workdir) -> list[list[tuple[int, int]]]:
  """(number, pid) of the processes of each group, in their order."""
  groups: dict[str, list[tuple[int, int]]] = {}
  for path in sorted(workdir.glob('up_*'), key=lambda path: path.stat().st_mtime_ns):
    _, address, host, pid = path.name.split('_')
    groups.setdefault(address, []).append((int(host), int(pid)))
  return [sorted(group) for group in groups.values()]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(supervise, 'FIRST_DELAY', 0.01)
  monkeypatch.setenv('PYTHONPATH', str(tiny.ROOT))


@pytest.mark.parametrize('host', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_survivors_keep_their_pids_and_numbers_and_a_new_process_replaces_the_dead_one(tmp_path, capsys, host):
  assert run(tmp_path, {0: {host: (3, 9)}}) == 0
  before, after = map(dict, ups(tmp_path))
  assert [before[i] == after[i] for i in range(3)] == [i != host for i in range(3)]
  (incident,) = incidents(tmp_path)
  assert (incident['action'], incident['cause'], incident['host']) == ('survival', 'killed', host)
  assert incident['seconds_down'] > 0
  assert 'survival 1 of 100.' in capsys.readouterr().err
  lines = read_timeline(tmp_path)
  died, again = next(line['t'] for line in lines if 'event' in line), max(line.get('began', 0.0) for line in lines)
  assert incident['seconds_down'] > again - died + 0.01, 'what survivors wrote before they went on is no step'
  found, wall = goodput(lines), lines[-1]['t'] - next(line['began'] for line in lines if 'began' in line)
  assert sum(found['seconds'].values()) == pytest.approx(wall, rel=0.02), 'every second is counted once'
  assert (found['processes'], found['failures']) == (2, 1)


@pytest.mark.slow
def test_if_fewer_are_allowed_survivors_are_renumbered_and_none_is_started(tmp_path):
  assert run(tmp_path, {0: {0: (3, 9)}, 1: {0: (3, 9)}}, min_hosts=1) == 0
  first, second, third = ups(tmp_path)
  assert [pid for _, pid in second] == [pid for _, pid in first[1:]]
  assert third == [(0, first[2][1])]
  assert [i['action'] for i in incidents(tmp_path)] == ['survival with 2 hosts', 'survival with 1 hosts']


@pytest.mark.slow
@pytest.mark.parametrize('what', [int(signal.SIGSTOP), pytest.param('deaf', marks=pytest.mark.slow)])
def test_if_survival_takes_too_long_all_are_ended_and_restarted(tmp_path, what):
  plan = {0: {1: (3, 9)}} if what == 'deaf' else {0: {1: (3, 9), 0: (2, what), 2: (2, what)}}
  assert run(tmp_path, plan, mode=str(what), survive=1.0, max_restarts=3) == 0
  found = [(i['cause'], i['action']) for i in incidents(tmp_path)]
  assert found == [('killed', 'survival'), ('not survived in time', 'restart')]
  assert not {pid for _, pid in ups(tmp_path)[0]} & {pid for _, pid in ups(tmp_path)[-1]}


@pytest.mark.slow
def test_a_death_before_there_is_a_state_again_restarts_all(tmp_path):
  assert run(tmp_path, {0: {1: (3, 9)}, 1: {2: (None, 9)}}) == 0
  assert [i['action'] for i in incidents(tmp_path)] == ['survival', 'restart']


@pytest.mark.parametrize(
  ('code', 'wanted'),
  [
    (71, 'stop'),
    *(pytest.param(*p, marks=pytest.mark.slow) for p in ((74, 'restart'), (72, 'rewind'), (1, 'survival'))),
  ],
)
def test_an_error_that_all_share_is_not_survived(tmp_path, code, wanted):
  """A process that exits by itself can be survived too, if the error is its own."""
  assert run(tmp_path, {0: {1: (3, -code)}}) == (code if wanted == 'stop' else 0)
  assert [i['action'] for i in incidents(tmp_path)] == [wanted]


def test_without_the_key_all_are_restarted(tmp_path):
  script = "import os, sys; sys.exit('PRETRAIN_MEMBERS' in os.environ)"
  assert Supervisor(2, [sys.executable, '-c', script], tmp_path, Policy(), stream=io.StringIO()).run() == 0


def test_the_key_is_refused_with_an_accelerator(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('pretrain.cli.run.has_accelerator', lambda: True)
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path}', '--gin.elastic.survive=True']
  assert main.main(['run', '--hosts=2', '--', 'train', *flags]) == 64
  error = capsys.readouterr().err
  assert 'elastic.survive=True is for CPU processes, and this machine has an accelerator; remove it.' in error


def test_hanging_up_ends_connections_to_peers_but_not_to_the_coordinator():
  with socket.create_server(('127.0.0.1', 0)) as peer, socket.create_server(('127.0.0.1', 0)) as coordinator:
    waits, stays = (socket.create_connection(server.getsockname()) for server in (peer, coordinator))
    ends = [peer.accept()[0], coordinator.accept()[0]]
    with waits, stays, ends[0], ends[1]:
      for end in ends:
        end.settimeout(0.2)
      before = set(os.listdir('/proc/self/fd'))
      hang_up(but=coordinator.getsockname()[1])
      assert set(os.listdir('/proc/self/fd')) <= before, 'no descriptor is left open'
      assert ends[0].recv(1) == b''
      stays.sendall(b'x')


def test_the_private_names_that_survival_needs_exist():
  """Names of JAX and Orbax: a version without them fails here."""
  coordinator = Coordinator(1)
  with socket.create_connection(coordinator.address.split(':')):
    pass
  coordinator.close()
  signaling_client.get_signaling_client()
  for _ in range(3):
    synchronization.OperationIdGenerator.next_operation_id()
  orbax_files.forget_processes()
  assert synchronization.OperationIdGenerator.get_current_operation_id() == '0'
  assert synchronization.OperationIdGenerator.next_operation_id() == 1
  assert signaling_client.get_signaling_client.cache_info().currsize == 0


def trained(workdir, hosts: int, policy: Policy, kill: int, at: int, *keys: str) -> list[str]:
  """Trains a decoder, whose process `kill` dies at step `at` if there is a checkpoint; returns the output."""
  keys = (*tiny.SMALL_DECODER, 'train.steps=30', 'checkpoint.every=10', 'data.batch_size=6', 'mesh.data=6', *keys)
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={workdir}', *(f'--gin.{key}' for key in keys)]
  script = TRAIN.replace('step == 15', f'step == {at}')
  said = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('KILL', str(kill))
    patch.setenv('SIGNAL', str(int(signal.SIGKILL)))
    patch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')
    command = [sys.executable, '-c', 'import os; print("BEGAN", os.getpid())\n' + script, str(workdir), *flags]
    Supervisor(hosts, command, workdir, policy, stream=said).run()
  return said.getvalue().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kill', 'fewer', 'keys'),
  [(0, False, ()), (1, True, ()), (2, False, ('snapshot.every=3', 'snapshot.group=3'))],
)
def test_losses_equal_those_of_a_run_restarted_with_that_many_processes(tmp_path, kill, fewer, keys):
  at = random.Random(kill).randrange(12, 28)
  policy = Policy(survive=120.0, min_hosts=2 if fewer else None)
  said = trained(tmp_path / 'survived', 3, policy, kill, at, 'elastic.survive=True', *keys)
  trained(tmp_path / 'ended', 3, Policy(max_restarts=0), kill, at, *keys)
  trained(tmp_path / 'ended', 2 if fewer else 3, Policy(), kill, at, *keys)
  found = numbers(tmp_path / 'survived')
  assert [row[0] for row in found] == list(range(1, 31))
  assert found == numbers(tmp_path / 'ended')
  (incident,) = incidents(tmp_path / 'survived')
  assert incident['action'] == ('survival with 2 hosts' if fewer else 'survival')
  assert 10 <= incident['step_resumed'] <= at, 'it did not begin anew'
  assert incident['seconds_down'] > 0
  assert len([line for line in said if 'BEGAN' in line]) == (3 if fewer else 4), 'survivors are not started again'
  assert len([line for line in said if 'SURVIVED: process' in line]) == 2
  lines = read_timeline(tmp_path / 'survived')
  wall = lines[-1]['t'] - next(line['began'] for line in lines if 'began' in line)
  assert sum(goodput(lines)['seconds'].values()) == pytest.approx(wall, rel=0.02)
