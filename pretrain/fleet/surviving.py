"""Experimental: when a process of a run dies, the others go on in the same processes instead of being started again.

The supervisor sees the death, and lets the others live. Their step breaks: the sockets of the dead one are closed, and
what is asked of them raises; one after the other lets go of its own, which frees those that wait for it. Each then
leaves JAX's runtime with its backend, reads who belongs to the run from now on, joins them, and begins as a process
that was just started does: from the newest step in memory or on disk. So a run has the losses of one that was started
again; what is saved is the start of Python, imports, and programs that are compiled already.

What makes it sound: the coordinator is in the supervisor, where the death of no process ends it, and is told that its
processes may fail (`recoverable`); else JAX aborts all of them (docs/design/0015).
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
from pretrain.fleet import launch

MEMBERS = 'members.json'  # of the workdir: in it the supervisor tells who makes up the run from now on
SECONDS_TO_HEAR = 10.0  # from an error to the supervisor's word on whose death it was; else it is an error
SECONDS_TO_END = 10.0  # for threads that may wait for the dead; Orbax has some that nothing wakes
ASKING = re.compile(r'(save|snapshot)_\d+|async_save')  # threads that ask other processes; so may any class of Orbax's


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElasticConfig:
  """Experimental. With `survive`, of `pretrain run --hosts=N` those processes that did not die go on as they are.

  A new process takes the place of the dead one; with `--min_hosts` they go on without it, and stay fewer. Those who
  have no state again within `seconds` of the death are ended, and the run is started again as it is without this key.
  So it is after a second death before that, or one before the first state, and where a process hangs that is no peer
  of a dead one: the watchdog ends it. CPU processes of one machine alone.
  """

  survive: bool = False
  seconds: Annotated[float, '> 0'] = 120.0


class Coordinator:
  """Serves the processes of a run from outside of them."""

  def __init__(self, hosts: int):
    from jax._src.lib import _jax  # no public name starts it without being process 0

    self.address = f'127.0.0.1:{launch.free_port()}'
    self._service = _jax.get_distributed_runtime_service(
      self.address, hosts, heartbeat_timeout=launch.HEARTBEAT_SECONDS, recoverable=True
    )

  def close(self) -> None:
    """Ends who is still connected to it."""
    self._service.shutdown()


def announce(path: pathlib.Path, left: str, address: str, hosts: int, numbers: Mapping[int, int]) -> None:
  """Tells the processes of the coordinator `left` which one to join, and their numbers there by pid."""
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps({'left': left, 'coordinator': address, 'hosts': hosts, 'numbers': numbers}))
  temporary.replace(path)


def surviving(cfg: ElasticConfig, prepare: Callable[[int], None], start: Callable[[float | None], int]) -> int:
  """`start(None)`; where another process dies, this one joins those that live and calls `start(when)` again.

  `prepare(hosts)` readies the platform for so many processes.
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
    began = time.time()  # out of the block: its error holds the state, and by that the backend
    leave(cfg.seconds)
    join(place, prepare, cfg.seconds)
    host, hosts = place['host'], place['hosts']
    print(f'SURVIVED: process {host} of {hosts} goes on; another one has died ({said}).', file=sys.stderr, flush=True)


class News:
  """Waits, in a thread, for the supervisor's word that a process at the coordinator `left` has died.

  Then `hang_up(port of left)`, so that whatever this process waits for raises.
  """

  def __init__(self, path: pathlib.Path, left: str, hang_up: Callable[[int], None]):
    self._path, self._left, self._hang_up, self._heard = path, left, hang_up, threading.Event()
    self._place: dict[str, Any] | None = None
    threading.Thread(target=self._listen, name='news', daemon=True).start()

  def wait(self, seconds: float) -> dict[str, Any] | None:
    """This process's place in the run from now on; None where nobody has died."""
    self._heard.wait(seconds)
    return self._place

  def _listen(self) -> None:
    while self._place is None:
      time.sleep(launch.POLL_SECONDS)
      with contextlib.suppress(FileNotFoundError):
        found = json.loads(self._path.read_text())
        if found['left'] == self._left and (host := found['numbers'].get(str(os.getpid()))) is not None:
          self._place = {'host': host, 'hosts': found['hosts'], 'coordinator': found['coordinator']}
    self._hang_up(launch.place_of(self._left)[1])
    self._heard.set()


def end_waiting(coordinator: int) -> None:
  """What waits for a process that has died raises: in a collective, a barrier, or for an answer."""
  import jax

  hang_up(but=coordinator)
  jax.distributed.shutdown()  # cancels calls of other threads


def hang_up(but: int) -> None:
  """Ends this process's connections over loopback, but for those to port `but`: what waits in one raises.

  A rank whose neighbours live waits for what they will never send, and gloo has no way to be told (NCCL's is
  ncclCommAbort).
  """
  for path in pathlib.Path('/proc/self/fd').iterdir():
    with contextlib.suppress(OSError):  # one that nobody is at, or that was closed just now
      if os.readlink(path).startswith('socket:'):
        with socket.socket(fileno=os.dup(int(path.name))) as connection:
          if connection.family in (socket.AF_INET, socket.AF_INET6) and is_peer(*connection.getpeername()[:2], but):
            connection.shutdown(socket.SHUT_RDWR)


def is_peer(address: str, port: int, coordinator: int) -> bool:
  """Whether another process of the run may be at the other end.

  >>> [is_peer(*found, 8476) for found in (('127.0.0.1', 99), ('::ffff:127.0.0.1', 99), ('127.0.0.1', 8476))]
  [True, True, False]
  """
  return ipaddress.ip_address(address.removeprefix('::ffff:')).is_loopback and port != coordinator


def leave(seconds: float) -> None:
  """No backend, compiled program or thread of the run is left. Raises HostError where a thread stays."""
  import jax.extend.backend

  from pretrain.checkpoints import orbax_files
  from pretrain.hosts import coordination

  with launch.ending_after(seconds, f'process {coordination.host()} could not leave the run of one that has died.'):
    end_threads()
    gc.collect()
    jax.extend.backend.clear_backends()
    gc.collect()
  coordination.forget()
  orbax_files.forget_processes()


def end_threads() -> None:
  """Those that ask other processes have ended: they would ask the new ones. Raises HostError where one has not.

  Orbax's among them: a save that was under way came to its barriers when the new processes were at theirs, of the same
  names, and all waited for ever.
  """
  deadline = time.monotonic() + SECONDS_TO_END
  for thread in threading.enumerate():
    if ASKING.fullmatch(thread.name) or type(thread).__module__.startswith('orbax.'):
      thread.join(max(deadline - time.monotonic(), 0.0))
      if thread.is_alive():
        raise HostError(f'thread {thread.name} still waits for a process that has died. What is saved is whole.')


def join(place: Mapping[str, Any], prepare: Callable[[int], None], seconds: float) -> None:
  """This process is one of those that make up the run from now on."""
  values = {launch.COORDINATOR: place['coordinator'], launch.NUM_HOSTS: place['hosts'], launch.HOST: place['host']}
  os.environ |= {name: str(value) for name, value in values.items()}
  prepare(place['hosts'])
  launch.initialize_from_env(seconds)
