"""The small files of a run: all but its checkpoints. On a disk they are where they are written.

A run in a store writes them to a folder of its host, the spool, exactly as a run on a disk does; `Mirrored` copies what
changed to the store: whole files, at most once in SECONDS, before each step begins to exist, and at the end. A store
has no append, so nothing else could be done with a record that grows.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pretrain.errors import ConfigError, UserError
from pretrain.workdirs.cache import local_cache_dir
from pretrain.workdirs.folder import Folder
from pretrain.workdirs.refusals import StoreError
from pretrain.workdirs.store_path import StorePath

SPOOL = 'PRETRAIN_SPOOL'  # the folder of spools; default: workdirs in the local cache
SECONDS = 5.0  # a bucket of Google takes about one write a second of one object
SECONDS_AT_END = 10.0  # for stacks: the process ends afterwards, whether they are uploaded or not
OWNER, LOCK = '.owner', '.lock'  # of the spool: the last run that wrote in it; who uploads now
KEPT = 'imported/'  # the only folder that a run reads; all files of the workdir itself are brought too
OWNER_OBJECT = 'OWNER'  # of the store: see hosts/lease.py
OF_ONE_PROCESS = ('hang_', 'profile/')  # what processes other than the first write


class RunFiles:
  """The files of a run in a folder of a disk."""

  def __init__(self, place: pathlib.Path):
    self.place: Folder = place
    self.folder = place

  def open(self, owner: str | None, before: str | None, check: Callable[[], None] = lambda: None) -> None:
    """The files of the run are in `folder`. `owner` writes them now, `before` did so last (None: not known).

    `check` raises an error once they belong to another run.
    """

  def push(self) -> None:
    """What is written in `folder` is at `place`."""

  def close(self) -> bool:
    """Whether all files are at `place`."""
    return True

  def upload(self, path: pathlib.Path) -> str:
    """A file that was just written is at `place`; returns its name there. Takes at most SECONDS_AT_END."""
    return str(path)

  @contextlib.contextmanager
  def named(self) -> Iterator[None]:
    """Inside the block errors name `place`, not `folder`."""
    yield


class Mirrored(RunFiles):
  """The files of a run in a store, as process number `process` of the run sees them: a spool, and its copy."""

  def __init__(self, place: StorePath, process: int, parent: pathlib.Path | None = None):
    """The spool is a folder of `parent` with the name of the run."""
    self.place, self._store, self._process = place, place, process
    self.folder = (parent or spools() / f'{hash_of(place.url)}-{process}') / (place.name or place.bucket)
    self._seen: dict[str, tuple[int, int]] = {}
    self._check: Callable[[], None] = lambda: None
    self._stop, self._thread = threading.Event(), threading.Thread(target=self._run, name='mirror', daemon=True)

  def open(self, owner: str | None, before: str | None, check: Callable[[], None] = lambda: None) -> None:
    """A spool in which `before` wrote last has all that the store has, and more. Any other one is made anew."""
    mark = self.folder / OWNER
    if owner is None or before is None or not mark.exists() or mark.read_text() != before:
      shutil.rmtree(self.folder, ignore_errors=True)
      self.fetch()
    if owner is not None:
      mark.write_text(owner)
    self.push()
    self._check = check
    if owner is None or owner != before:  # otherwise this process was started by the owner, which uploads too
      self._thread.start()

  def fetch(self) -> None:
    """The files that a run reads are in `folder`, as the store has them."""
    self.folder.mkdir(parents=True)
    for name in self._store.names():
      if '/' in name.removeprefix(KEPT) or name == OWNER_OBJECT or name.startswith(OF_ONE_PROCESS):
        continue
      path = self.folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes((self._store / name).read_bytes())
      self._seen[name] = version_of(path)

  def _run(self) -> None:
    seconds = SECONDS
    while not self._stop.wait(seconds):
      start = time.monotonic()
      with contextlib.suppress(StoreError):  # the next push is the retry; a save and the end report it
        try:
          self._check()
        except ConfigError:  # nothing is written any more; the next save ends the run
          return
        self.push()
      seconds = max(SECONDS, 20 * (time.monotonic() - start))

  def push(self) -> None:
    """Uploads every file that has changed since it was uploaded last. Raises StoreError."""
    with locked(self.folder / LOCK):
      changed = self._changed()
      writes = [(name, seen, (self._store / name).begin_write(data)) for name, seen, data in changed]
      for name, seen, wait in writes:
        wait()
        self._seen[name] = seen

  def _changed(self) -> Iterator[tuple[str, tuple[int, int], bytes]]:
    for path in sorted(self.folder.rglob('*')):
      name = path.relative_to(self.folder).as_posix()
      if self._is_ours(name) and path.is_file():
        with contextlib.suppress(FileNotFoundError):  # it was replaced while it was read; the next push has it
          if self._seen.get(name) != (seen := version_of(path)):
            yield name, seen, path.read_bytes()

  def _is_ours(self, name: str) -> bool:
    if name in (OWNER, LOCK) or name.endswith('.tmp'):
      return False
    return not self._process or name.startswith(OF_ONE_PROCESS)

  def close(self) -> bool:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()
    try:
      self._check()
      self.push()
    except ConfigError:  # they belong to another run
      return True
    except StoreError as error:
      print(
        f'{error} The last lines of the records of this run are only in {self.folder} of this host; the next start on '
        'this host uploads them.',
        file=sys.stderr,
      )
      return False
    return True

  def upload(self, path: pathlib.Path) -> str:
    name = path.relative_to(self.folder).as_posix()
    done = threading.Thread(target=self._upload, args=(name, path.read_bytes()), daemon=True)
    done.start()
    done.join(SECONDS_AT_END)
    return str(path) if done.is_alive() else str(self._store / name)

  def _upload(self, name: str, data: bytes) -> None:
    with contextlib.suppress(StoreError):
      (self._store / name).write_bytes(data)

  @contextlib.contextmanager
  def named(self) -> Iterator[None]:
    try:
      yield
    except UserError as error:
      error.args = (str(error).replace(str(self.folder), self._store.url), *error.args[1:])
      raise


def run_files(place: Folder, process: int = 0) -> RunFiles:
  """The small files of the run at `place`, for process number `process` of it; nothing is read or written yet."""
  return Mirrored(place, process) if isinstance(place, StorePath) else RunFiles(place)


def spools() -> pathlib.Path:
  """The folder of the spools of all runs on this host."""
  return pathlib.Path(os.environ.get(SPOOL) or local_cache_dir() / 'workdirs')


def hash_of(url: str) -> str:
  return hashlib.sha256(url.encode()).hexdigest()[:12]


def version_of(path: pathlib.Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_mtime_ns, found.st_size


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Inside the block no other process of this host is inside it: an older upload never follows a newer one."""
  with path.open('a') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
