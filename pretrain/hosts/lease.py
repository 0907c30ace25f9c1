"""A run owns a workdir in a store through the object WORKDIR/OWNER, which it writes again every RENEW_SECONDS.

A store has no locks, and clocks of two hosts are not compared: who wants the workdir watches the object. If it has not
changed for LEASE_SECONDS its owner has ended, and the object is replaced, on the condition that it still has not
changed. An owner on this host that has ended is recognised at once. Before each commit the owner looks at the object.
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax._src import distributed  # no public name has the number of processes without starting a backend

from data.buckets import credentials_of
from pretrain.errors import ConfigError
from pretrain.hosts import coordination
from pretrain.workdirs.refusals import StoreError
from pretrain.workdirs.run_files import RunFiles
from pretrain.workdirs.store_path import StorePath

FILE = 'OWNER'
INHERITED = 'PRETRAIN_LEASE'  # the id of the owner, for processes that it starts
RENEW_SECONDS = 8.0
LEASE_SECONDS = 30.0
POLL_SECONDS = 1.0


class Lease:
  """The ownership of a workdir by a run. `before` is the id of the owner before it that did not end by itself."""

  def __init__(self, place: StorePath, owner: str, before: str | None = None):
    self.owner, self.before = owner, before
    self.kept = False  # True: OWNER stays in the store, so that the next run on this host knows who wrote last
    self._object = place / FILE

  def check(self) -> None:
    """Raises ConfigError if the workdir belongs to another run now."""
    data, _ = self._object.read_version()
    found = parsed(data)
    if data is not None and found.get('id') != self.owner:
      raise ConfigError(
        f'--workdir={self._object.parent} belongs to {described(found)} now: this run was not heard of for '
        f'{LEASE_SECONDS:.0f} s. It ends here and has changed nothing since; saved steps are intact.'
      )


def inherited(place: StorePath) -> Lease | None:
  """The lease that `pretrain run` holds for this process; None where it does not own `place`."""
  owner = os.environ.get(INHERITED)
  if owner is None or parsed((place / FILE).read_version()[0]).get('id') != owner:
    return None
  return Lease(place, owner, before=owner)


@contextlib.contextmanager
def kept(files: RunFiles, lock: Lease | int | None) -> Iterator[Callable[[], None]]:
  """Inside the block the small files of a run that owns its workdir are there, and what is written is kept.

  All processes of a run call it. Yields what process 0 must do before a step begins to exist: the files that belong to
  the step are in the store, and so is the run itself. On a disk there is nothing to do.
  """
  if isinstance(files.place, pathlib.Path):
    yield lambda: None
    return
  first = coordination.host() == 0
  lease = lock if isinstance(lock, Lease) else None
  if lease is not None:
    files.open(lease.owner, lease.before, lease.check)
  together('files of process 0')
  if not first:
    files.open(None, None)
  together('files')

  def before_commit() -> None:
    if lease is not None:
      lease.check()
    files.push()

  try:
    yield before_commit
  finally:
    whole = files.close()
    if lease is not None:
      lease.kept = not whole


def together(what: str) -> None:
  """Returns when all processes of this run have called it."""
  if distributed.global_state.num_processes > 1:
    coordination.Agreement.about(what).gather('')


@contextlib.contextmanager
def leased(place: StorePath, flag: str) -> Iterator[Lease]:
  """Inside the block `place` belongs to this process. Raises ConfigError that names the owner where there is one."""
  try:
    place.check_reachable()
    holding = _acquire(place, flag)
  except StoreError as error:
    raise ConfigError(
      f'{flag}={place} cannot be used: {error.strerror}. Nothing was changed; check the bucket and the credentials.'
    ) from error
  holding.start()
  try:
    _check_listed(place, flag)
    yield holding.lease
  finally:
    holding.stop()


def _check_listed(place: StorePath, flag: str) -> None:
  """Raises ConfigError if the store does not list what is there: a run would not find its own steps."""
  if FILE not in place.names():
    raise ConfigError(
      f'{flag}={place} holds {FILE}, and the store does not list it (credentials from {credentials_of(place.url)}). '
      'Nothing was changed; give them permission to list objects.'
    )


class _Holding:
  """OWNER as this process has written it last; a thread writes it again and again."""

  def __init__(self, lease: Lease, place: StorePath, version: bytes):
    self.lease, self._object, self._version = lease, place / FILE, version
    self._stop, self._thread = threading.Event(), threading.Thread(target=self._renew, name='lease', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def _renew(self) -> None:
    while not self._stop.wait(RENEW_SECONDS):
      with contextlib.suppress(StoreError):  # it is tried again; the lease lasts longer than several tries
        version = self._object.write_if(_text(self.lease.owner), self._version)
        if version is None:
          return  # another run owns it, or a person has removed it: `check` tells which
        self._version = version

  def stop(self) -> None:
    self._stop.set()
    self._thread.join()
    if not self.lease.kept:
      with contextlib.suppress(StoreError):  # then the next run waits until the lease has ended
        self._object.remove_if(self._version)


def _acquire(place: StorePath, flag: str) -> _Holding:
  path, owner, told = place / FILE, secrets.token_hex(8), False
  seen, since = b'', time.monotonic()
  while True:
    data, version = path.read_version()
    if version != seen:
      if seen and data is not None:
        raise _belongs(place, flag, parsed(data))
      seen, since = version, time.monotonic()
    found = parsed(data)
    if data is None or has_ended(found) or time.monotonic() - since > LEASE_SECONDS:
      if new := path.write_if(_text(owner), version):
        return _Holding(Lease(place, owner, found.get('id')), place, new)
      seen = b'-'  # another run was faster
      continue
    if not told:
      print(f'{flag}={place} belonged to {described(found)}: waiting up to {LEASE_SECONDS:.0f} s for a sign of it.',
            file=sys.stderr, flush=True)  # fmt: skip
      told = True
    time.sleep(POLL_SECONDS)


def _belongs(place: StorePath, flag: str, found: dict[str, Any]) -> ConfigError:
  return ConfigError(
    f'{flag}={place} belongs to {described(found)}, which has not ended. Nothing was changed; wait for its end, stop '
    f'it, or use another {flag}.'
  )


def _text(owner: str) -> bytes:
  """OWNER; unlike every text before it, because some stores know a version by its contents."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='microseconds')
  since = _since.setdefault(owner, now[:19] + '+00:00')
  who = {'host': socket.gethostname(), 'pid': os.getpid(), 'began': began(os.getpid()), 'machine': machine()}
  return (json.dumps({'id': owner, **who, 'since': since, 'renewed': now}) + '\n').encode()


_since: dict[str, str] = {}


def parsed(data: bytes | None) -> dict[str, Any]:
  """What OWNER says; {} where it says nothing that can be read."""
  try:
    found = json.loads(data or b'{}')
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def described(found: dict[str, Any]) -> str:
  if not {'pid', 'host', 'since'} <= found.keys():
    return 'another run'
  return f'the run of process {found["pid"]} on {found["host"]} (since {found["since"]})'


def has_ended(found: dict[str, Any]) -> bool:
  """Whether the owner is a process of this machine that is no more."""
  return bool(machine()) and found.get('machine') == machine() and began(found.get('pid')) != found.get('began')


def machine() -> str:
  """This start of this machine, and the processes that this process can see (a container has its own)."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip() + os.readlink('/proc/self/ns/pid')
  except OSError:
    return ''


def began(pid: Any) -> str | None:
  """When a process began, in ticks of the kernel; None where there is no such process. Numbers are used again."""
  try:
    fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return None
  return None if fields[0] == 'Z' else fields[19]  # Z: it has ended, and its parent has not asked for its exit code
