"""Folders of a run that are read and written by programs which know disks only, such as those of a tokenizer."""

import atexit
import contextlib
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from pretrain.workdirs.folder import Folder
from pretrain.workdirs.run_files import Mirrored
from pretrain.workdirs.store_path import StorePath


def local_copy(folder: Folder) -> pathlib.Path:
  """The folder itself or, for one in a store, a copy on this host that is removed when the process ends."""
  return folder if isinstance(folder, pathlib.Path) else _copy(folder)


@functools.cache
def _copy(folder: StorePath) -> pathlib.Path:
  made = pathlib.Path(tempfile.mkdtemp(prefix='pretrain-'))
  atexit.register(shutil.rmtree, made, ignore_errors=True)
  for name in folder.names():
    (made / name).parent.mkdir(parents=True, exist_ok=True)
    (made / name).write_bytes((folder / name).read_bytes())
  return made


@contextlib.contextmanager
def made_in(folder: Folder) -> Iterator[pathlib.Path]:
  """Inside the block, a new folder on this host; what is written in it is in `folder` after the block."""
  if isinstance(folder, pathlib.Path):
    folder.mkdir()
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix='pretrain-') as made:
    yield pathlib.Path(made)
    for path in sorted(pathlib.Path(made).rglob('*')):
      if path.is_file():
        (folder / path.relative_to(made).as_posix()).write_bytes(path.read_bytes())


@contextlib.contextmanager
def small_files(place: Folder) -> Iterator[pathlib.Path]:
  """Inside the block, a folder on this host with the small files of a run; what is changed is at `place` afterwards.

  For commands that are not a run. On a disk it is `place` itself.
  """
  if isinstance(place, pathlib.Path):
    yield place
    return
  with tempfile.TemporaryDirectory(prefix='pretrain-') as made:
    files = Mirrored(place, 0, pathlib.Path(made))
    with files.named():
      files.fetch()
      yield files.folder
      files.push()
