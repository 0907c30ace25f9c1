"""gs:// and s3:// for fsspec, over TensorStore: through it etils.epath, Orbax and JAX's compilation cache use a store.

No package beyond the lock is needed. `register` replaces the implementations that fsspec would import (gcsfs, s3fs).
"""

import functools
import io
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

from pretrain.workdirs.store_path import StorePath


class Bridge(AbstractFileSystem):
  """The objects of one scheme as fsspec's files. A folder is there if an object's name begins with its name."""

  cachable = True
  scheme: ClassVar[str]

  @classmethod
  def _strip_protocol(cls, path: Any) -> str:
    return os.fspath(path).rpartition('://')[2].strip('/')

  def _at(self, path: Any) -> StorePath:
    return StorePath(f'{self.scheme}://{self._strip_protocol(path)}')

  def _open(self, path: str, mode: str = 'rb', **_: Any) -> io.BytesIO:
    if 'r' in mode:
      return io.BytesIO(self._at(path).read_bytes())
    return Writing(self._at(path))

  def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
    at, name = self._at(path), self._strip_protocol(path)
    kinds: dict[str, str] = {}
    for key in at.names():
      head, slash, _rest = key.partition('/')
      kinds[f'{name}/{head}'] = 'directory' if slash else 'file'
    if not kinds and at.key:
      return [self.info(path)] if detail else [name]
    found = [{'name': name, 'type': kind, 'size': None} for name, kind in sorted(kinds.items())]
    return found if detail else [entry['name'] for entry in found]

  def info(self, path: str, **_: Any) -> dict[str, Any]:
    """The kind of an entry. Its size is None: a store that is asked through TensorStore does not tell it."""
    at, name = self._at(path), self._strip_protocol(path)
    if at.key and at.is_file():
      return {'name': name, 'type': 'file', 'size': None}
    if not at.key or at.is_dir():
      return {'name': name, 'type': 'directory', 'size': 0}
    raise FileNotFoundError(2, 'No such object', at.url)

  def rm_file(self, path: str) -> None:
    self._at(path).unlink()

  def rm(self, path: str | Sequence[str], recursive: bool = False, maxdepth: int | None = None) -> None:
    for one in [path] if isinstance(path, str) else path:
      if recursive:
        self._at(one).remove_tree()
      self._at(one).unlink()

  def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
    """Leaves an empty object whose name ends with a slash: epath and Orbax ask whether a folder is there."""
    at = self._at(path)
    Marker(f'{at.root}{at.key}/').touch()

  def makedirs(self, path: str, exist_ok: bool = False) -> None:
    self.mkdir(path)


class Marker(StorePath):
  """The object that stands for an empty folder; its name ends with a slash."""

  def __init__(self, url: str):
    super().__init__(url)
    self.key += '/'


class Writing(io.BytesIO):
  """The contents of an object, which is written when it is closed without an error."""

  def __init__(self, at: StorePath):
    super().__init__()
    self._at = at

  def close(self) -> None:
    if not self.closed:
      self._at.write_bytes(self.getvalue())
    super().close()

  def __exit__(self, kind: Any, *rest: Any) -> None:
    if kind is None:
      self.close()
    else:
      super().close()


@functools.cache
def register() -> None:
  """From here on fsspec opens gs:// and s3:// through TensorStore. epath asks for gs:// under the name gcs."""
  for scheme, protocols in (('gs', ('gs', 'gcs')), ('s3', ('s3',))):
    for protocol in protocols:
      kind = type(f'Bridge_{protocol}', (Bridge,), {'scheme': scheme, 'protocol': protocols})
      fsspec.register_implementation(protocol, kind, clobber=True)
