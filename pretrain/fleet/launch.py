"""Several processes as one run: `pretrain run` starts them on this machine, `initialize_from_env` makes them one.

Everything stays on 127.0.0.1: JAX's own default would open the coordinator to the network.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from pretrain import errors
from pretrain.errors import ConfigError, HostError
from pretrain.hosts.ownership import INHERITED
from pretrain.redact import redact

COORDINATOR, NUM_HOSTS, HOST = 'PRETRAIN_COORDINATOR', 'PRETRAIN_NUM_HOSTS', 'PRETRAIN_HOST'
SERVED = 'PRETRAIN_MEMBERS'  # set where the supervisor serves the coordinator: the file that names another one
IDLE = '127.0.0.1:0'  # where process 0 has JAX listen for nobody, then
PREEMPTED, HANG, REWOUND, CORRUPTED = 75, 70, 72, 74
USER_CODES = (64, 65, 66, 71)  # a restart would find the same
POLL_SECONDS = 0.02
HEARTBEAT_SECONDS = 60  # a peer that went silent (stopped, cut off) is noticed; the launcher sees dead ones at once
MEETING_SECONDS = 300.0
MEET_FIX = (
  'Nothing was changed; start those that are missing, let them through firewalls, or set a longer watchdog.init.'
)
LOWEST_PORT = 10_000  # most services have one below it
EVERYWHERE = ('0.0.0.0', '::', '*')
GRACE_SECONDS = 3  # between the signal that asks processes to end and the one that ends them
GRACE_AFTER_KILL = 0.3  # who waits in a collective for one that was killed has nothing to say, and no step to save
PR_SET_PDEATHSIG = 1
ROOT = str(pathlib.Path(__file__).resolve().parents[1])


def num_hosts() -> int:
  """Processes of this run, from the environment; 1 when it was not started by `pretrain run`."""
  return _integer(NUM_HOSTS) if NUM_HOSTS in os.environ else 1


def _integer(name: str) -> int:
  try:
    return int(os.environ[name])
  except ValueError as error:
    raise ConfigError(f'{name}={os.environ[name]!r} is no number; `pretrain run` sets it.') from error


def initialize_from_env(seconds: float = MEETING_SECONDS) -> None:
  """Joins the processes that `pretrain run` started; nothing where there is one. Call before any JAX backend starts.

  Raises ConfigError where only a part of the three variables is set, or the coordinator's address is no place to
  listen at; HostError where not all have met within `seconds`.
  """
  found = [name for name in (COORDINATOR, NUM_HOSTS, HOST) if name in os.environ]
  if not found:
    return
  if len(found) < 3:
    raise ConfigError(f'{" and ".join(found)} set, but not all of {COORDINATOR}, {NUM_HOSTS}, {HOST}; set all or none.')
  address, host, number = os.environ[COORDINATOR], _integer(HOST), num_hosts()
  if not 0 <= host < number:
    raise ConfigError(f'{HOST}={host} with {NUM_HOSTS}={number}; processes are numbered from 0.')
  place, deadline = place_of(address), time.monotonic() + seconds
  serves = host == 0 and SERVED not in os.environ
  if serves:
    check_free(place, address)
  else:
    wait_until_heard(place, address, host, seconds)
  import jax

  with ending_after(max(0.1, deadline - time.monotonic()), f'process {host} of {number} has not met the others at '
                    f'{address} within {seconds:.0f} s. {MEET_FIX}'):  # fmt: skip
    jax.distributed.initialize(
      coordinator_address=address,
      num_processes=number,
      process_id=host,
      coordinator_bind_address=address if serves else IDLE,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      initialization_timeout=math.ceil(seconds) + 60,  # it would abort the process, and not say where it had waited
    )


@contextlib.contextmanager
def ending_after(seconds: float, message: str) -> Iterator[None]:
  """What is inside ends the process with code 70 and this sentence where it takes longer."""

  def end() -> None:
    print(HostError(message), file=sys.stderr, flush=True)
    os._exit(HANG)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def place_of(address: str) -> tuple[str, int]:
  """(host, port) of the coordinator's address. Raises ConfigError where it is none, or open to every network.

  >>> place_of('10.0.0.7:8476')
  ('10.0.0.7', 8476)
  """
  host, _, port = address.rpartition(':')
  host = host.strip('[]')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ConfigError(f'{COORDINATOR}={address} is no address; write HOST:PORT, e.g. 10.0.0.7:8476.')
  if host in EVERYWHERE:
    raise ConfigError(
      f'{COORDINATOR}={address} would open the coordinator, which asks for no password, to every network; name the '
      'address of one, e.g. 10.0.0.7:8476.'
    )
  return host, int(port)


def check_free(place: tuple[str, int], address: str) -> None:
  """Raises ConfigError where process 0 cannot listen there."""
  try:
    family, *_, where = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(where)
  except OSError as error:
    raise ConfigError(
      f'{COORDINATOR}={address} is no place for process 0 to listen at ({error.strerror}). No process has begun; end '
      'what listens there, or take another port.'
    ) from error


def wait_until_heard(place: tuple[str, int], address: str, host: int, seconds: float) -> None:
  """Returns when something listens there; raises HostError where nothing does within `seconds`."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection(place, timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise HostError(
          f'process {host} has not reached the coordinator at {address} within {seconds:.0f} s ({error}). {MEET_FIX}'
        ) from error
    time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
  """What fails inside ends the process at once where there are several: JAX would wait for its peers, they for it."""
  try:
    yield
  except Exception as error:
    if num_hosts() == 1:
      raise
    known = isinstance(error, errors.USER_ERRORS)
    print(redact(str(error) if known else traceback.format_exc()), file=sys.stderr, flush=True)
    os._exit(error.exit_code if known else 1)


def program(command: Sequence[str]) -> list[str]:
  """`pretrain COMMAND`, whatever the current folder holds."""
  return [sys.executable, '-P', '-m', 'pretrain', *command]


def run(hosts: int, command: Sequence[str], stream: TextIO | None = None) -> int:
  """Runs `pretrain COMMAND` in `hosts` local processes and returns the worst exit code.

  Their lines come out on `stream` (default: stdout) behind `[host] `. SIGTERM and Ctrl-C are passed on; when one
  process fails the others are ended, and all of them die with this one.
  """
  if hosts < 1:
    raise ConfigError(f'--hosts={hosts}; it must be at least 1.')
  return run_program(hosts, program(command), stream or sys.stdout)


def run_program(hosts: int, command: Sequence[str], stream: TextIO) -> int:
  """`run` for any program."""
  group = Group(hosts, command, stream)
  with ForwardedSignals(group.signal):
    return group.wait().code


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a group ended: the code and number of the process that failed first, and when; code 0 or 75 where none did."""

  code: int
  host: int
  time: float


@dataclasses.dataclass
class Member:
  """A process of a group, its number in the run, and the thread that passes its lines on."""

  host: int
  process: subprocess.Popen
  reader: threading.Thread


class Group:
  """Local processes that end together. `env` names a coordinator that none of them serves; None: process 0 does."""

  def __init__(
    self, hosts: int, command: Sequence[str], stream: TextIO, env: Mapping[str, str] | None = None,
    lock: int | None = None,
  ):  # fmt: skip
    self._command, self._stream, self._lock = command, stream, lock
    env = env or {COORDINATOR: f'127.0.0.1:{free_port()}'}
    self._members = [self._start(host, hosts, env) for host in range(hosts)]

  def _start(self, host: int, hosts: int, env: Mapping[str, str]) -> Member:
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get('PYTHONPATH'))))
    # Ours go before any other package named `data`; -P leaves out the current folder.
    process = start(self._command, {**env, 'PYTHONPATH': path, NUM_HOSTS: str(hosts), HOST: str(host)}, self._lock)
    member = Member(host, process, threading.Thread())
    member.reader = threading.Thread(target=prefix_lines, args=(process.stdout, member, self._stream), daemon=True)
    member.reader.start()
    return member

  def living(self) -> list[Member]:
    return [member for member in self._members if member.process.poll() is None]

  def regroup(self, hosts: int, env: Mapping[str, str]) -> dict[int, int]:
    """pid -> its number from now on of each process that lives; others are started, so that there are `hosts`."""
    living = self.living()
    if any(member.host >= hosts for member in living):
      for host, member in enumerate(living):
        member.host = host
    taken = {member.host for member in living}
    added = [self._start(host, hosts, env) for host in range(hosts) if host not in taken]
    self._members = sorted([*living, *added], key=lambda member: member.host)
    return {member.process.pid: member.host for member in living}

  def signal(self, number: int) -> None:
    for member in self.living():
      member.process.send_signal(number)

  def wait(
    self, watch: Callable[[], None] = lambda: None, spared: Callable[[Outcome], bool] = lambda outcome: False
  ) -> Outcome:
    """Of the one that failed by itself, not because it was told to end. `watch` is called again and again.

    Where `spared(outcome)` the others live on: `regroup` or `end` is next.
    """
    outcome, deadline, since = None, math.inf, math.inf
    while None in (codes := [member.process.poll() for member in self._members]):
      watch()
      failed = failures(codes)
      since = min(since, time.monotonic() if failed else math.inf)
      cause = self._cause(failed) if failed and outcome is None else None
      if cause and not (may_follow(cause.code) and time.monotonic() < since + GRACE_AFTER_KILL):
        outcome = cause
        if len(failed) + codes.count(None) == len(codes) and spared(outcome):
          return outcome
        deadline = time.monotonic() + (GRACE_AFTER_KILL if outcome.code == 128 + signal.SIGKILL else GRACE_SECONDS)
        self.signal(signal.SIGTERM)
      elif time.monotonic() > deadline:
        self.signal(signal.SIGKILL)
      time.sleep(POLL_SECONDS)
    for member in self._members:
      member.reader.join(GRACE_SECONDS)  # what a process has left behind may hold its pipe for ever
    watch()
    ended = {index: exit_code(code) for index, code in enumerate(codes)}
    return outcome or self._cause(failures(codes) or ended)

  def end(self) -> None:
    """Nobody lives."""
    if self.living():
      self.signal(signal.SIGKILL)
      self.wait()

  def _cause(self, codes: Mapping[int, int]) -> Outcome:
    return first_cause({self._members[index].host: code for index, code in codes.items()})


def failures(codes: Sequence[int | None]) -> dict[int, int]:
  """host -> exit code of the processes that failed so far; one that was interrupted and has saved did not."""
  return {host: exit_code(code) for host, code in enumerate(codes) if code and code != PREEMPTED}


def first_cause(codes: Mapping[int, int]) -> Outcome:
  """Of processes that failed within a blink: what a user can mend or all agreed upon before a hang, before one that was
  killed, and last those that JAX aborts because another one is gone."""
  agreed = (*USER_CODES, REWOUND, CORRUPTED)
  rank = lambda code: (code not in agreed, code != HANG, code == 128 + signal.SIGABRT, code <= 128, -code)
  host, code = min(codes.items(), key=lambda item: rank(item[1]))
  return Outcome(code, host, time.time())


def may_follow(code: int) -> bool:
  """Whether a process ends like this because another one was killed, which may be seen later: it is busy dying."""
  return code == 128 + signal.SIGABRT or (code <= 128 and code not in (*USER_CODES, HANG, REWOUND, CORRUPTED))


def exit_code(returncode: int) -> int:
  """A shell's way to say it: a process ended by signal n has code 128 + n.

  >>> exit_code(-9), exit_code(64)
  (137, 64)
  """
  return 128 - returncode if returncode < 0 else returncode


# Runs before the command, in its process: Popen's preexec_fn, the usual place, may not be used where there are threads.
# The request survives exec. A parent that died before it was made is noticed by the line below it.
DIE_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})
if os.getppid() == int(sys.argv[1]):
  os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(command: Sequence[str], env: dict[str, str], lock: int | None = None) -> subprocess.Popen:
  """A process that the kernel kills should this one die, by kill -9 too (Linux). It inherits the open file `lock`."""
  if lock is not None:
    env = env | {INHERITED: str(lock)}
  wrapped = [sys.executable, '-I', '-S', '-c', DIE_WITH_PARENT, str(os.getpid()), *command]
  # In a process group of its own, because Ctrl-C in a terminal goes to the whole group: it would arrive twice.
  return subprocess.Popen(
    wrapped, env=os.environ | env | {'PYTHONUNBUFFERED': '1'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    text=True, errors='replace', process_group=0, pass_fds=[] if lock is None else [lock],
  )  # fmt: skip


def prefix_lines(source: TextIO, member: Member, stream: TextIO) -> None:
  """Copies lines as they come; each is one write, so that lines of different processes do not mix."""
  with source:
    for line in source:
      stream.write(f'[{member.host}] {redact(line.rstrip())}\n')
      stream.flush()


def free_port() -> int:
  """A port of 127.0.0.1 that was free a moment ago, and that no connection is given before process 0 listens there."""
  end = first_connection_port()
  own = random.sample(range(LOWEST_PORT, end), 20) if end > LOWEST_PORT + 1000 else []
  for port in (*own, 0):  # 0: any, where the kernel gives connections all of them
    with socket.socket() as probe, contextlib.suppress(OSError):  # somebody listens there
      probe.bind(('127.0.0.1', port))
      return probe.getsockname()[1]
  raise HostError('127.0.0.1 has no free port; no process has begun. End what takes them, and run the same command.')


def first_connection_port() -> int:
  """The first of the ports that the kernel gives to connections; 0 where it does not say (no Linux)."""
  try:
    return int(pathlib.Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split()[0])
  except OSError:
    return 0


class ForwardedSignals:
  """Inside the block, SIGTERM and SIGINT call `handler(number)` instead of ending this process."""

  def __init__(self, handler):
    self._handler = handler

  def __enter__(self):
    handle = lambda number, _frame: self._handler(number)
    self._previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}

  def __exit__(self, kind, error, trace):
    for number, previous in self._previous.items():
      signal.signal(number, previous)
