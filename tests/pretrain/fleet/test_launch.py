"""`pretrain run`: several local processes that form one run, and end together."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from pretrain.errors import ConfigError
from pretrain.fleet import launch
from tests.pretrain import tiny

SUM = """
import os, sys
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
from pretrain.fleet.launch import initialize_from_env
initialize_from_env()
import jax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
total = multihost_utils.process_allgather(jax.process_index() + 10)
counts = jax.process_count(), jax.device_count(), jax.local_device_count()
# In one write: a library that says something meanwhile must not part it.
sys.stdout.write(f'sum {int(total.sum())} {counts[0]} {counts[1]} {counts[2]}\\n')
"""
# Ends host 1 with code 64 at once; the others would sleep for a minute.
ONE_FAILS = "import os, sys, time; sys.exit(64) if os.environ['PRETRAIN_HOST'] == '1' else time.sleep(60)"
SLEEP = "print('up', flush=True); import time; time.sleep(60)"


def group(hosts, code, stream):
  return launch.Group(hosts, [sys.executable, '-c', code], stream)


def test_three_processes_are_one_run():
  stream = io.StringIO()
  assert group(3, SUM, stream).wait().code == 0, stream.getvalue()
  lines = [line for line in stream.getvalue().splitlines() if 'sum' in line]
  assert sorted(lines) == [f'[{host}] sum 33 3 6 2' for host in range(3)]


def test_a_crash_just_before_a_kill_is_seen_is_not_taken_for_the_cause(monkeypatch, tmp_path):
  monkeypatch.setattr(launch, 'GRACE_AFTER_KILL', 20.0)
  code = f"""
import os, pathlib, time
host, gone = os.environ['PRETRAIN_HOST'], pathlib.Path({str(tmp_path / 'gone')!r})
if host == '2':
  gone.touch()
  os._exit(1)
while host == '0' or not gone.exists():
  time.sleep(0.01)
time.sleep(0.2)
os.kill(os.getpid(), 9)
"""
  outcome = group(3, code, io.StringIO()).wait()
  assert (outcome.host, outcome.code) == (1, 137)


def test_no_connection_takes_the_port_of_the_coordinator():
  """It listens seconds later; if the port is taken then, code 64 would end a run that only needed a restart."""
  first = launch.first_connection_port()
  ports = {launch.free_port() for _ in range(50)}
  assert len(ports) > 40, 'two runs that start at once have different ones'
  assert first <= 11_000 or max(ports) < first


def test_when_one_fails_all_end_with_its_code():
  start = time.monotonic()
  assert group(3, ONE_FAILS, io.StringIO()).wait().code == 64
  assert time.monotonic() - start < 20


def test_an_interrupted_process_that_saved_does_not_end_the_others():
  code = "import os, sys, time; host = int(os.environ['PRETRAIN_HOST']); time.sleep(host); print('saved'); sys.exit(75)"
  stream = io.StringIO()
  assert group(2, code, stream).wait().code == 75
  assert sorted(stream.getvalue().splitlines()) == ['[0] saved', '[1] saved']


def test_if_several_fail_together_the_cause_is_named():
  blamed = lambda codes: launch.first_cause(codes).host
  assert blamed({0: 134, 1: 137, 2: 1}) == 1, 'a killed one, not those that JAX aborts for it'
  assert blamed({0: 137, 1: 70, 2: 134}) == 1, 'a hang'
  assert blamed({0: 70, 1: 1, 2: 64}) == 2, 'what a user can mend'


def test_a_process_that_ignores_sigterm_is_killed(monkeypatch):
  monkeypatch.setattr(launch, 'GRACE_SECONDS', 0.5)
  deaf = 'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); import time; time.sleep(2); '
  start = time.monotonic()
  assert group(2, deaf + ONE_FAILS, io.StringIO()).wait().code == 64
  assert time.monotonic() - start < 30


def test_a_child_that_outlives_its_process_is_not_waited_for(monkeypatch):
  """The child holds the pipe from which lines are read."""
  monkeypatch.setattr(launch, 'GRACE_SECONDS', 0.5)
  code = "import subprocess, sys; print('said', flush=True); subprocess.Popen(['sleep', '30']); sys.exit(3)"
  stream, start = io.StringIO(), time.monotonic()
  assert group(1, code, stream).wait().code == 3
  assert time.monotonic() - start < 20
  assert stream.getvalue() == '[0] said\n'


def test_processes_that_wait_for_a_killed_one_are_ended_at_once(monkeypatch):
  """In a collective they have nothing to save, and every second delays the restart."""
  monkeypatch.setattr(launch, 'GRACE_SECONDS', 60)
  code = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.environ['PRETRAIN_HOST'] == '1' and os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
  start = time.monotonic()
  assert group(2, code, io.StringIO()).wait().code == 128 + signal.SIGKILL
  assert time.monotonic() - start < 30


def test_a_signal_is_passed_on_and_shows_in_the_code():
  command = [sys.executable, '-c', 'from tests.pretrain.fleet.test_launch import *; sys.exit(run_sleepers())']
  with subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True) as process:
    assert {process.stdout.readline(), process.stdout.readline()} == {'[0] up\n', '[1] up\n'}
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def run_sleepers():
  return launch.run_program(2, [sys.executable, '-c', SLEEP], sys.stdout)


def test_no_process_outlives_a_killed_launcher():
  code = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
  command = [
    sys.executable,
    '-c',
    f'from tests.pretrain.fleet.test_launch import *; group(2, {code!r}, sys.stdout).wait()',
  ]
  with subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True) as process:
    children = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    assert all(map(alive, children))
    process.kill()
  deadline = time.monotonic() + 10
  while any(map(alive, children)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(alive, children))


def alive(pid: int) -> bool:
  """True for a process that runs; a zombie is dead."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def test_the_coordinator_listens_only_on_loopback():
  code = f"""{SUM}
tables = open('/proc/self/net/tcp').read() + open('/proc/self/net/tcp6').read()
print(os.environ['PRETRAIN_COORDINATOR'], tables)
"""
  stream = io.StringIO()
  assert group(2, code, stream).wait().code == 0, stream.getvalue()
  port = int(re.search(r'127\.0\.0\.1:(\d+)', stream.getvalue())[1])
  listening = re.findall(rf' ([0-9A-F]+):{port:04X} [0-9A-F]+:0000 0A', stream.getvalue())
  assert listening, 'the port was found'
  assert all(address.endswith('0100007F') for address in listening), '127.0.0.1, not all addresses'


CACHED = """
import logging, os
from pretrain.fleet import launch
from pretrain.devices import mesh
from pretrain.devices.compilation_cache import use_compilation_cache
mesh.prepare_platform(mesh.MeshConfig(data=2), 2)
launch.initialize_from_env()
use_compilation_cache()
import jax
from jax._src import compiler
seen = []
compiler.log_persistent_cache_miss = lambda *_: seen.append('miss')
compiler.log_persistent_cache_hit = lambda *_: seen.append('hit')
from jax.experimental import multihost_utils
multihost_utils.process_allgather(jax.numpy.ones(3))
print('seen', sorted(set(seen)))
"""


@pytest.mark.slow
def test_every_process_finds_its_compiled_programs_again(tmp_path, monkeypatch):
  """JAX writes only those of process 0; the others would compile at each restart."""
  for name in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('PRETRAIN_CACHE', str(tmp_path))
  seen = []
  for _ in range(2):
    stream = io.StringIO()
    assert launch.run_program(2, [sys.executable, '-c', CACHED], stream) == 0, stream.getvalue()
    seen.append(sorted(line for line in stream.getvalue().splitlines() if 'seen' in line))
  assert seen == [[f"[{host}] seen ['{what}']" for host in range(2)] for what in ('miss', 'hit')]


def test_output_lines_have_the_host_as_prefix():
  stream = io.StringIO()
  code = "import sys; print('out'); print('err', file=sys.stderr); sys.stdout.buffer.write(b'\\xff\\n')"
  assert group(1, code, stream).wait().code == 0
  assert sorted(stream.getvalue().splitlines()) == ['[0] err', '[0] out', '[0] \ufffd']


@pytest.mark.slow
def test_the_command_runs_in_every_process(capsys):
  assert launch.run(2, ['train', '--gin_file=no.gin', '--workdir=none']) == 64
  where = f'no.gin (looked for in {os.getcwd()})'
  message = f'CONFIG: --gin_file={where} cannot be read (No such file or directory); check the path.'
  lines = capsys.readouterr().out.splitlines()  # the second to fail may be ended before it can say so
  assert lines
  assert set(lines) <= {f'[{host}] {message}' for host in range(2)}


def test_a_process_that_uses_jax_may_start_others(capsys):
  """JAX has threads, and warns of a fork."""
  jax.numpy.zeros(3).block_until_ready()
  assert group(1, "print('fine')", io.StringIO()).wait().code == 0


def test_without_the_variables_there_is_one_process(monkeypatch):
  for name in (launch.COORDINATOR, launch.NUM_HOSTS, launch.HOST):
    monkeypatch.delenv(name, raising=False)
  launch.initialize_from_env()
  assert launch.num_hosts() == 1


@pytest.mark.parametrize(
  ('env', 'message'),
  [
    ({'PRETRAIN_NUM_HOSTS': '2'}, 'CONFIG: PRETRAIN_NUM_HOSTS set, but not all of PRETRAIN_COORDINATOR, '),
    (
      {'PRETRAIN_NUM_HOSTS': 'two', 'PRETRAIN_HOST': '0', 'PRETRAIN_COORDINATOR': '127.0.0.1:1'},
      "CONFIG: PRETRAIN_NUM_HOSTS='two' is not a number",
    ),
  ],
)
def test_half_an_environment_is_refused(monkeypatch, env, message):
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError) as caught:
    launch.initialize_from_env()
  assert str(caught.value).startswith(message)


def test_no_hosts_are_refused():
  with pytest.raises(ConfigError, match='--hosts=0; it must be at least 1'):
    launch.run(0, ['train'])
