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
from pretrain.fleet import addresses, cluster
from pretrain.fleet.cluster import COORDINATOR, HOST, NUM_HOSTS
from pretrain.hosts import lease
from pretrain.hosts.lease import Lease
from pretrain.hosts.ownership import INHERITED
from pretrain.redact import redact

SERVED = 'PRETRAIN_MEMBERS'  # set if the supervisor runs the coordinator: the file that names the next coordinator
IDLE = '127.0.0.1:0'  # process 0 then starts a coordinator of JAX that no process uses
PREEMPTED, HANG, REWOUND, CORRUPTED = 75, 70, 72, 74
USER_CODES = (64, 65, 66, 71)  # a restart would fail the same way
POLL_SECONDS = 0.02
HEARTBEAT_SECONDS = 60  # detects a silent peer (stopped, cut off); the launcher sees dead ones at once
MEETING_SECONDS = 300.0
LOWEST_PORT = 10_000  # most services use lower ports
GRACE_SECONDS = 3  # between SIGTERM and SIGKILL
GRACE_AFTER_KILL = 0.3  # a process that waits in a collective for a killed one has no step to save
PR_SET_PDEATHSIG = 1
ROOT = str(pathlib.Path(__file__).resolve().parents[1])


def num_hosts() -> int:
  """Processes of this run, from the environment; 1 when it was not started by `pretrain run` or a cluster."""
  return cluster.number(os.environ, NUM_HOSTS, '`pretrain run`') if NUM_HOSTS in os.environ else 1


def join_cluster(choice: str | None, replica: int) -> cluster.Member | None:
  """Which processes form this run: `cluster.find`, and the environment names them. None for one process.

  `choice` is the flag --cluster, `replica` the size of that mesh axis. Raises what `find` and `check_slices` raise.
  """
  member = cluster.find(os.environ, choice)
  cluster.check_slices(member, replica)
  cluster.adopt(member, os.environ)
  if member is not None and member.how != 'pretrain':
    print(member, file=sys.stderr, flush=True)
  return member


def initialize_from_env(seconds: float = MEETING_SECONDS, found: cluster.Member | None = None) -> None:
  """Joins the processes that the environment names; does nothing for one process. Call before JAX's backend starts.

  `found` is what `join_cluster` returned. Raises ConfigError if only some of the three variables are set, or process 0
  cannot listen on the coordinator's address; HostError if not all processes have connected within `seconds`.
  """
  cluster.check_whole(os.environ)
  if (member := cluster.ours(os.environ)) is None:
    return
  address, deadline = member.coordinator, time.monotonic() + seconds
  place, serves = addresses.place_of(address), member.this == 0 and SERVED not in os.environ
  bind = IDLE
  if serves:
    address = bind = addresses.bind_address(address, found, seconds)
    addresses.check_free(addresses.place_of(bind), address)
  else:
    addresses.wait_until_heard(place, address, member.this, seconds)
  import jax

  with ending_after(max(0.1, deadline - time.monotonic()), f'process {member.this} of {member.processes} has not '
                    f'connected to the others at {address} within {seconds:.0f} s. {addresses.MEET_FIX}'):  # fmt: skip
    jax.distributed.initialize(
      coordinator_address=address,
      num_processes=member.processes,
      process_id=member.this,
      cluster_detection_method='deactivate',  # it would limit each process of Slurm and Open MPI to one GPU
      coordinator_bind_address=bind,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      initialization_timeout=math.ceil(seconds) + 60,  # later than our own: JAX aborts without naming the address
    )


@contextlib.contextmanager
def ending_after(seconds: float, message: str) -> Iterator[None]:
  """Ends the process with code 70 and this message if the block takes longer than `seconds`."""

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


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
  """With several processes, an error inside ends this one at once: JAX's exit would wait for its peers, they for it."""
  try:
    yield
  except Exception as error:
    if num_hosts() == 1:
      raise
    known = isinstance(error, errors.USER_ERRORS)
    print(redact(str(error) if known else traceback.format_exc()), file=sys.stderr, flush=True)
    os._exit(error.exit_code if known else 1)


def program(command: Sequence[str]) -> list[str]:
  """The command line of `pretrain COMMAND`, independent of the contents of the current folder."""
  return [sys.executable, '-P', '-m', 'pretrain', *command]


def run(hosts: int, command: Sequence[str], stream: TextIO | None = None) -> int:
  """Runs `pretrain COMMAND` in `hosts` local processes and returns the worst exit code.

  Their lines are written to `stream` (default: stdout) with the prefix `[host] `. SIGTERM and Ctrl-C are passed on.
  When one process fails the others are ended, and all of them die with this one.
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
  """How a group ended: the code and number of the process that failed first, and when; code 0 or 75 if none failed."""

  code: int
  host: int
  time: float


@dataclasses.dataclass
class Member:
  """A process of a group, its number in the run, and the thread that forwards its lines."""

  host: int
  process: subprocess.Popen
  reader: threading.Thread


class Group:
  """Local processes that end together. `env` names an external coordinator; None: process 0 runs the coordinator."""

  def __init__(
    self, hosts: int, command: Sequence[str], stream: TextIO, env: Mapping[str, str] | None = None,
    lock: int | Lease | None = None,
  ):  # fmt: skip
    self._command, self._stream, self._lock = command, stream, lock
    env = env or {COORDINATOR: f'127.0.0.1:{free_port()}'}
    self._members = [self._start(host, hosts, env) for host in range(hosts)]

  def _start(self, host: int, hosts: int, env: Mapping[str, str]) -> Member:
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get('PYTHONPATH'))))
    # Our packages come before any other package named `data`; -P leaves out the current folder.
    process = start(self._command, {**env, 'PYTHONPATH': path, NUM_HOSTS: str(hosts), HOST: str(host)}, self._lock)
    member = Member(host, process, threading.Thread())
    member.reader = threading.Thread(target=prefix_lines, args=(process.stdout, member, self._stream), daemon=True)
    member.reader.start()
    return member

  def living(self) -> list[Member]:
    return [member for member in self._members if member.process.poll() is None]

  def regroup(self, hosts: int, env: Mapping[str, str]) -> dict[int, int]:
    """pid -> new number of each living process; starts others, so that there are `hosts`."""
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
    """The outcome of the process that failed by itself, not because it was told to end. Calls `watch` repeatedly.

    If `spared(outcome)` is true the others are not ended: call `regroup` or `end` next.
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
      member.reader.join(GRACE_SECONDS)  # a child that outlived the process may hold its pipe for ever
    watch()
    ended = {index: exit_code(code) for index, code in enumerate(codes)}
    return outcome or self._cause(failures(codes) or ended)

  def end(self) -> None:
    """Ends all processes."""
    if self.living():
      self.signal(signal.SIGKILL)
      self.wait()

  def _cause(self, codes: Mapping[int, int]) -> Outcome:
    return first_cause({self._members[index].host: code for index, code in codes.items()})


def failures(codes: Sequence[int | None]) -> dict[int, int]:
  """host -> exit code of the processes that failed so far; an interrupted process that saved did not fail."""
  return {host: exit_code(code) for host, code in enumerate(codes) if code and code != PREEMPTED}


def first_cause(codes: Mapping[int, int]) -> Outcome:
  """The likely cause among processes that failed almost together: first codes of user errors and codes that all agree
  on, then a hang, a kill, a crash, and last a process that JAX aborted because another one ended."""
  agreed = (*USER_CODES, REWOUND, CORRUPTED)
  rank = lambda code: (code not in agreed, code != HANG, code == 128 + signal.SIGABRT, code <= 128, -code)
  host, code = min(codes.items(), key=lambda item: rank(item[1]))
  return Outcome(code, host, time.time())


def may_follow(code: int) -> bool:
  """Whether this code may be the consequence of another process's death that is not visible yet."""
  return code == 128 + signal.SIGABRT or (code <= 128 and code not in (*USER_CODES, HANG, REWOUND, CORRUPTED))


def exit_code(returncode: int) -> int:
  """The exit code as a shell reports it: 128 + n for a process that was ended by signal n.

  >>> exit_code(-9), exit_code(64)
  (137, 64)
  """
  return 128 - returncode if returncode < 0 else returncode


# Runs before the command, in its process: Popen's preexec_fn, the usual place, is unsafe with threads. The request
# survives exec. The line below it detects a parent that died before the request was made.
DIE_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})
if os.getppid() == int(sys.argv[1]):
  os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(command: Sequence[str], env: dict[str, str], lock: int | Lease | None = None) -> subprocess.Popen:
  """Starts a process that inherits `lock`, and that the kernel kills if this one dies, also by kill -9 (Linux)."""
  if isinstance(lock, Lease):
    env, lock = env | {lease.INHERITED: lock.owner}, None
  elif lock is not None:
    env = env | {INHERITED: str(lock)}
  wrapped = [sys.executable, '-I', '-S', '-c', DIE_WITH_PARENT, str(os.getpid()), *command]
  # In its own process group, because Ctrl-C in a terminal goes to the whole group and would arrive twice.
  return subprocess.Popen(
    wrapped, env=os.environ | env | {'PYTHONUNBUFFERED': '1'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    text=True, errors='replace', process_group=0, pass_fds=[] if lock is None else [lock],
  )  # fmt: skip


def prefix_lines(source: TextIO, member: Member, stream: TextIO) -> None:
  """Copies lines as they arrive; each is one write, so that lines of different processes do not mix."""
  with source:
    for line in source:
      stream.write(f'[{member.host}] {redact(line.rstrip())}\n')
      stream.flush()


def free_port() -> int:
  """A port of 127.0.0.1 that was free just now, if possible outside the range that the kernel uses for connections."""
  end = first_connection_port()
  own = random.sample(range(LOWEST_PORT, end), 20) if end > LOWEST_PORT + 1000 else []
  for port in (*own, 0):  # 0: any port, if the kernel assigns all of them to connections
    with socket.socket() as probe, contextlib.suppress(OSError):  # the port is taken
      probe.bind(('127.0.0.1', port))
      return probe.getsockname()[1]
  raise HostError('127.0.0.1 has no free port; no process was started. Free some ports and run the same command.')


def first_connection_port() -> int:
  """The first port that the kernel assigns to connections; 0 if it is unknown (not Linux)."""
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
