"""A store on a local disk is built in a temporary folder beside its path, and moved to its path when complete."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import time

from data.errors import DataError
from data.stores.arrays import read_file
from data.stores.paths import absolute, is_local, local_path

_LONGEST = 200  # bytes of a name, so that the name of the staging folder fits in the 255 that file systems allow


def refuse_existing(path: str | os.PathLike[str]) -> None:
  """Raises DataError if something already exists at the path of a new store."""
  exists = os.path.lexists(local_path(path)) if is_local(path) else read_file(path, 'manifest.json') is not None
  if exists:
    raise DataError(f'{os.fspath(path)} already exists. Nothing was changed; choose another --out, or remove it.')


class Staging:
  """A new folder beside `path`, and any missing parent folders. `remove` restores the disk to its earlier state."""

  def __init__(self, path: str | os.PathLike[str]):
    self._path = path
    self._target = pathlib.Path(absolute(local_path(path)))
    self._parents: list[pathlib.Path] = []  # parent folders created here, outermost first
    self.folder: str | None = None

  def make(self) -> str:
    """Creates the folder and returns its path. Raises DataError if it cannot be created."""
    try:
      for parent in reversed(self._target.parents):
        if not parent.exists():
          self._make_parent(parent)
      self.folder = self._new_folder()
    except OSError as error:
      self.remove()
      raise DataError(f'{os.fspath(self._path)} cannot be written ({error.strerror}); choose another --out.') from error
    return self.folder

  def _make_parent(self, parent: pathlib.Path) -> None:
    with contextlib.suppress(FileExistsError):  # another process was faster
      parent.mkdir()
      self._parents.append(parent)

  def _new_folder(self) -> str:
    """Creates a folder under a name that is not taken: the user may have a file of the same name."""
    name, count = self._target.name, 0
    if len(os.fsencode(name)) > _LONGEST:
      name = hashlib.sha256(os.fsencode(name)).hexdigest()
    while True:
      folder = self._target.with_name(f'{name}.partial-{os.getpid()}' + f'-{count}' * bool(count))
      try:
        folder.mkdir()
      except FileExistsError:
        count += 1
      else:
        return str(folder)

  def move(self) -> None:
    """Moves the folder to its final path. Raises DataError if something has appeared there meanwhile."""
    refuse_existing(self._path)
    try:
      os.rename(self.folder, self._target)
    except OSError as error:
      raise DataError(f'{os.fspath(self._path)} cannot be written ({error.strerror}); choose another --out.') from error
    self.folder, self._parents = None, []

  def remove(self) -> None:
    """Deletes everything that was created and not moved."""
    if self.folder is not None:
      _remove_tree(self.folder)
    for parent in reversed(self._parents):
      try:
        parent.rmdir()
      except OSError:  # it contains something else by now
        break
    self.folder, self._parents = None, []


def _remove_tree(folder: str) -> None:
  """Deletes `folder`. A write that was interrupted (Ctrl-C) may still end there, in a thread of TensorStore."""
  for _ in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.exists(folder):
      return
    time.sleep(0.05)
