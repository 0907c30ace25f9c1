"""A store on a local disk is built in a folder beside its own, and moved there when it is complete."""

import contextlib
import hashlib
import os
import pathlib
import shutil

from data.errors import DataError
from data.stores.arrays import read_file
from data.stores.paths import absolute, is_local, local_path

_LONGEST = 200  # bytes of a name, so that the name of the staging folder fits in the 255 that file systems allow


def refuse_existing(path: str | os.PathLike[str]) -> None:
  """Raises DataError where a store would be written over something."""
  exists = os.path.lexists(local_path(path)) if is_local(path) else read_file(path, 'manifest.json') is not None
  if exists:
    raise DataError(f'{os.fspath(path)} already exists. Nothing was changed; choose another --out, or remove it.')


class Staging:
  """A new folder beside `path`, with the parents that were missing. `remove` leaves the disk as it was before."""

  def __init__(self, path: str | os.PathLike[str]):
    self._path = path
    self._target = pathlib.Path(absolute(local_path(path)))
    self._parents: list[pathlib.Path] = []  # those that were made here, the outermost first
    self.folder: str | None = None

  def make(self) -> str:
    """The folder. Raises DataError where it cannot be made."""
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
    """A folder whose name nothing else has: a file of the user may be named like it."""
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
    """The folder is at its path. Raises DataError where something has come there meanwhile."""
    refuse_existing(self._path)
    try:
      os.rename(self.folder, self._target)
    except OSError as error:
      raise DataError(f'{os.fspath(self._path)} cannot be written ({error.strerror}); choose another --out.') from error
    self.folder, self._parents = None, []

  def remove(self) -> None:
    """What was made and not moved is gone."""
    if self.folder is not None:
      shutil.rmtree(self.folder, ignore_errors=True)
    for parent in reversed(self._parents):
      try:
        parent.rmdir()
      except OSError:  # something else is there by now
        break
    self.folder, self._parents = None, []
