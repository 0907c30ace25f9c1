"""Experimental: when a process of a run dies, the others continue in the same processes instead of being restarted.

The supervisor sees the death and does not end the others. Their step fails: the sockets of the dead process are closed,
so collectives over them raise an error. Each survivor closes its own sockets too, which releases the processes that
wait for it. It then leaves JAX's runtime with its backend, reads the new list of members, joins them, and starts like a
new process: from the newest step in host RAM or on disk. So the losses equal those of a restarted run. What is saved is
the start of Python, the imports, and the programs that are already compiled.

Why it works: the coordinator runs in the supervisor, which survives the death of any process, and is told that its
processes may fail (`recoverable`); otherwise JAX aborts all of them (docs/design/0015).
"""

import contextlib
import dataclasses
import gc
import ipaddress
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pretrain import errors
from pretrain.errors import HostError
from pretrain.fleet import addresses, launch

MEMBERS = 'members.json'  # in the workdir: the supervisor writes the new members of the run into it
SECONDS_TO_HEAR = 10.0  # from an error to the supervisor's report of a death; without a report it is a plain error
SECONDS_TO_END = 10.0  # for threads that may wait for the dead process; nothing wakes some of Orbax's
ASKING = re.compile(r'(save|snapshot)_\d+|async_save')  # threads that communicate; any thread class of Orbax may too


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElasticConfig:
  """Experimental. With `survive`, the processes of `pretrain run --hosts=N` that did not die continue as they are.

  A new process replaces the dead one; with `--min_hosts` the others continue without it, and stay fewer. If there is no
  state again within `seconds` of the death, all processes are ended and restarted, as without this key. The same
  happens after a second death before that, after a death before the first state, and if a process hangs for another
  reason (the watchdog ends it). Only for CPU processes on one machine.
  """

  survive: bool = False
  seconds: Annotated[float, '> 0'] = 120.0


class Coordinator:
  """JAX's coordination service, in the process of the supervisor."""

  def __init__(self, hosts: int):
    from jax._src.lib import _jax  # no public name starts it without being process 0

    self.address = f'127.0.0.1:{launch.free_port()}'
    self._service = _jax.get_distributed_runtime_service(
      self.address, hosts, heartbeat_timeout=launch.HEARTBEAT_SECONDS, recoverable=True
    )

  def close(self) -> None:
    """Ends the service and the connections to it."""
    self._service.shutdown()


def announce(path: pathlib.Path, left: str, address: str, hosts: int, numbers: Mapping[int, int]) -> None:
  """Tells the processes of coordinator `left` which coordinator to join, and their new numbers by pid."""
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps({'left': left, 'coordinator': address, 'hosts': hosts, 'numbers': numbers}))
  temporary.replace(path)


def surviving(cfg: ElasticConfig, prepare: Callable[[int], None], start: Callable[[float | None], int]) -> int:
  """Calls `start(None)`; after another process dies, joins the survivors and calls `start(when)` again.

  `prepare(hosts)` prepares the platform for that many processes.
  """
  if not cfg.survive or launch.SERVED not in os.environ:
    return start(None)
  began = None
  while True:
    news = News(pathlib.Path(os.environ[launch.SERVED]), os.environ[launch.COORDINATOR], end_waiting)
    try:
      return start(began)
    except Exception as error:
      known = isinstance(error, errors.USER_ERRORS) and not isinstance(error, HostError)
      if known or (place := news.wait(SECONDS_TO_HEAR)) is None:
        raise
      said = str(error).partition('\n')[0][:200]
    began = time.time()  # outside the except block, because its error keeps the state alive, and so the backend
    leave(cfg.seconds)
    join(place, prepare, cfg.seconds)
    host, hosts = place['host'], place['hosts']
    print(f'SURVIVED: process {host} of {hosts} continues; another one died ({said}).', file=sys.stderr, flush=True)


class News:
  """Waits, in a thread, for the supervisor's report that a process of coordinator `left` has died.

  Then calls `hang_up(port of left)`, so that everything this process waits for raises an error.
  """

  def __init__(self, path: pathlib.Path, left: str, hang_up: Callable[[int], None]):
    self._path, self._left, self._hang_up, self._heard = path, left, hang_up, threading.Event()
    self._place: dict[str, Any] | None = None
    threading.Thread(target=self._listen, name='news', daemon=True).start()

  def wait(self, seconds: float) -> dict[str, Any] | None:
    """This process's new place in the run; None if no process has died."""
    self._heard.wait(seconds)
    return self._place

  def _listen(self) -> None:
    while self._place is None:
      time.sleep(launch.POLL_SECONDS)
      with contextlib.suppress(FileNotFoundError):
        found = json.loads(self._path.read_text())
        if found['left'] == self._left and (host := found['numbers'].get(str(os.getpid()))) is not None:
          self._place = {'host': host, 'hosts': found['hosts'], 'coordinator': found['coordinator']}
    self._hang_up(addresses.place_of(self._left)[1])
    self._heard.set()


def end_waiting(coordinator: int) -> None:
  """Makes everything that waits for a dead process raise an error: collectives, barriers, answers."""
  import jax

  hang_up(but=coordinator)
  jax.distributed.shutdown()  # cancels calls of other threads


def hang_up(but: int) -> None:
  """Shuts down this process's loopback connections, except those to port `but`: code that waits on one raises.

  A rank whose neighbours live waits for data that they will never send, and gloo has no abort (NCCL has
  ncclCommAbort).
  """
  for path in pathlib.Path('/proc/self/fd').iterdir():
    with contextlib.suppress(OSError):  # a socket without a peer, or closed just now
      if os.readlink(path).startswith('socket:'):
        with socket.socket(fileno=os.dup(int(path.name))) as connection:
          if connection.family in (socket.AF_INET, socket.AF_INET6) and is_peer(*connection.getpeername()[:2], but):
            connection.shutdown(socket.SHUT_RDWR)


def is_peer(address: str, port: int, coordinator: int) -> bool:
  """Whether the other end may be another process of the run.

  >>> [is_peer(*found, 8476) for found in (('127.0.0.1', 99), ('::ffff:127.0.0.1', 99), ('127.0.0.1', 8476))]
  [True, True, False]
  """
  return ipaddress.ip_address(address.removeprefix('::ffff:')).is_loopback and port != coordinator


def leave(seconds: float) -> None:
  """Leaves the run: no backend, compiled program or thread remains. Raises HostError if a thread does not end."""
  import jax.extend.backend

  from pretrain.checkpoints import orbax_files
  from pretrain.hosts import coordination

  with launch.ending_after(seconds, f'process {coordination.host()} could not leave the run after another one died.'):
    end_threads()
    gc.collect()
    jax.extend.backend.clear_backends()
    gc.collect()
  coordination.forget()
  orbax_files.forget_processes()


def end_threads() -> None:
  """Waits for threads that communicate with other processes, which would reach the new ones. Raises HostError if one
  does not end.

  Orbax's are among them: a save under way reached its barriers when the new processes were at theirs, with the same
  names, and all waited for ever.
  """
  deadline = time.monotonic() + SECONDS_TO_END
  for thread in threading.enumerate():
    if ASKING.fullmatch(thread.name) or type(thread).__module__.startswith('orbax.'):
      thread.join(max(deadline - time.monotonic(), 0.0))
      if thread.is_alive():
        raise HostError(f'thread {thread.name} still waits for a process that has died. Saved steps are intact.')


def join(place: Mapping[str, Any], prepare: Callable[[int], None], seconds: float) -> None:
  """Joins the new group of processes of the run."""
  values = {launch.COORDINATOR: place['coordinator'], launch.NUM_HOSTS: place['hosts'], launch.HOST: place['host']}
  os.environ |= {name: str(value) for name, value in values.items()}
  prepare(place['hosts'])
  launch.initialize_from_env(seconds)
