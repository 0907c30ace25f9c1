"""One run owns a workdir: while it lasts, no other run or command writes there. Reading is always possible.

The owner holds an exclusive `flock` on WORKDIR/run.lock. The kernel frees it when the last process that has the file
open ends, also by kill -9. `pretrain run` holds it for its whole life, and its processes inherit the open file.
Otherwise process 0 of a run holds it for all. An object store has no locks: there the owner has a lease (`lease.py`).
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator

from jax._src import distributed  # no public name has the number of processes without starting a backend

from pretrain.errors import ConfigError
from pretrain.hosts import coordination, lease
from pretrain.hosts.lease import Lease
from pretrain.workdirs.folder import Folder
from pretrain.workdirs.store_path import StorePath

FILE = 'run.lock'
INHERITED = 'PRETRAIN_LOCK'  # the number of the open lock file that a process of `pretrain run` has inherited
SECONDS_TO_WAIT = 5.0  # for processes of an earlier run that were killed and have not ended yet
POLL_SECONDS = 0.05


@contextlib.contextmanager
def owned(workdir: Folder, flag: str = '--workdir') -> Iterator[int | Lease]:
  """Inside the block `workdir` belongs to this process; yields the open lock file, for processes that it starts.

  In a store it yields the lease. Raises ConfigError that names the owner where there is one already. Leaves nothing
  behind.
  """
  if isinstance(workdir, StorePath):
    with lease.leased(workdir, flag) as holding:
      yield holding
    return
  created = [path for path in (workdir, *workdir.parents) if not path.exists()]
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = _acquire(workdir, flag)
  except OSError as error:
    _remove_empty(created)
    text = f'{flag}={workdir} cannot be written ({error.strerror}). Nothing was changed; choose another folder.'
    raise ConfigError(text) from error
  try:
    yield lock
  finally:
    os.close(lock)
    _remove(workdir / FILE)
    _remove_empty(created)


@contextlib.contextmanager
def owned_by_run(workdir: Folder) -> Iterator[Lease | None]:
  """Inside the block `workdir` belongs to the run of this process. All processes of a run call it.

  Yields the lease of a workdir in a store to process 0. Raises ConfigError in all of them where another run owns it.
  """
  if isinstance(workdir, StorePath) and (holding := lease.inherited(workdir)):
    yield holding if coordination.host() == 0 else None
    return
  if isinstance(workdir, pathlib.Path) and _has_inherited(workdir):
    yield None
    return
  with contextlib.ExitStack() as stack:
    refused, lock = '', None
    if coordination.host() == 0:
      try:
        lock = stack.enter_context(owned(workdir))
      except ConfigError as error:
        refused = str(error).removeprefix(f'{ConfigError.code}: ')
    if distributed.global_state.num_processes > 1:
      refused = coordination.Agreement.about('owner').first(refused)
    if refused:
      raise ConfigError(refused)
    yield lock if isinstance(lock, Lease) else None


def _has_inherited(workdir: pathlib.Path) -> bool:
  """Whether this process was started with the lock of `workdir`. Processes that it starts do not inherit it."""
  try:
    lock = int(os.environ[INHERITED])
    if not os.path.samestat(os.fstat(lock), (workdir / FILE).stat()):
      return False
  except (KeyError, ValueError, OSError):
    return False
  os.set_inheritable(lock, False)
  return True


def _acquire(workdir: pathlib.Path, flag: str) -> int:
  """The lock file, open and locked; this process is written in it."""
  path, deadline = workdir / FILE, time.monotonic() + SECONDS_TO_WAIT
  while True:
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      owner = _owner(lock)
      os.close(lock)
      if time.monotonic() > deadline:
        raise ConfigError(
          f'{flag}={workdir} belongs to {owner}, which has not ended. Nothing was changed; wait for its end, stop it, '
          f'or use another {flag}.'
        ) from None
      time.sleep(POLL_SECONDS)
      continue
    except OSError as error:
      print(
        f'LOCK: the file system of {workdir} has no locks ({error.strerror}): a second run with the same {flag} would '
        'not be noticed, and would damage this one. Training continues; start one run only.',
        file=sys.stderr,
        flush=True,
      )
    if _is_current(lock, path):
      _write_owner(lock)
      return lock
    os.close(lock)  # the owner before has removed it between the two calls


def _is_current(lock: int, path: pathlib.Path) -> bool:
  """Whether the open file still has the name `path`."""
  try:
    return os.path.samestat(os.fstat(lock), path.stat())
  except FileNotFoundError:
    return False


def _write_owner(lock: int) -> None:
  since = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  text = json.dumps({'host': socket.gethostname(), 'pid': os.getpid(), 'since': since}) + '\n'
  with contextlib.suppress(OSError):  # a full disk: the lock holds, and the message of the next run lacks a name
    os.ftruncate(lock, 0)
    os.pwrite(lock, text.encode(), 0)


def _owner(lock: int) -> str:
  """The owner that is written in the lock file, in words."""
  try:
    found = json.loads(os.pread(lock, 4096, 0))
    return f'the run of process {found["pid"]} on {found["host"]} (since {found["since"]})'
  except (OSError, ValueError, KeyError, TypeError):
    return 'another run'


def _remove(path: pathlib.Path) -> None:
  """Removes the lock file unless another run, or a process that has inherited it, still holds it."""
  with contextlib.suppress(OSError):
    lock = os.open(path, os.O_RDWR)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _is_current(lock, path):
        path.unlink()
    finally:
      os.close(lock)


def _remove_empty(folders: list[pathlib.Path]) -> None:
  """Removes folders, innermost first, up to the first one in which something is."""
  with contextlib.suppress(OSError):
    for folder in folders:
      folder.rmdir()
