"""A file or folder of an object store, with the methods of `pathlib.Path` that reading a run needs; over TensorStore.

A store has no folders: a folder is there if the name of an object begins with its name and a slash. It has no rename
and no append either. What it does have is a write that happens only if the object is still as it was read.
"""

import contextlib
import fnmatch
import functools
import json
import os
from collections.abc import Iterator
from typing import Self

import tensorstore

from data.buckets import CONTEXT, RETRIES, spec_of
from pretrain.workdirs.refusals import refused

# Of the first request of a command: a wrong address, or one that does not answer, is reported within half a minute.
FIRST_RETRIES, FIRST_SECONDS = 3, 20.0


class StorePath:
  """The file or folder at `url`. Its methods raise StoreError where the store refuses, or cannot be reached."""

  def __init__(self, url: str):
    self.url = url.rstrip('/')
    scheme, _, rest = self.url.partition('://')
    self.bucket, _, self.key = rest.partition('/')
    self.root = f'{scheme}://{self.bucket}/'

  def __str__(self) -> str:
    return self.url

  def __repr__(self) -> str:
    return f'StorePath({self.url!r})'

  def __eq__(self, other: object) -> bool:
    return isinstance(other, StorePath) and self.url == other.url

  def __hash__(self) -> int:
    return hash(self.url)

  def __truediv__(self, name: str) -> Self:
    return type(self)(f'{self.url}/{name}')

  @property
  def name(self) -> str:
    return self.key.rpartition('/')[2]

  @property
  def stem(self) -> str:
    return self.name.rpartition('.')[0] or self.name

  @property
  def suffix(self) -> str:
    return self.name.removeprefix(self.stem)

  @property
  def parent(self) -> Self:
    return type(self)(self.root + self.key.rpartition('/')[0])

  def with_name(self, name: str) -> Self:
    return self.parent / name

  def resolve(self) -> Self:
    return self

  def absolute(self) -> Self:
    return self

  def is_symlink(self) -> bool:
    return False

  def exists(self) -> bool:
    return self.is_file() or self.is_dir()

  def is_file(self) -> bool:
    with self._asking('read'):
      return bool(self.key) and self._store.read(self.key, byte_range=slice(0, 0)).result().state == 'value'

  def is_dir(self) -> bool:
    return bool(self._keys())

  def names(self) -> list[str]:
    """The names of all objects below this folder, in order, without the marks that stand for empty folders."""
    return sorted(name for name in self._keys() if name and not name.endswith('/'))

  def iterdir(self) -> Iterator[Self]:
    found = dict.fromkeys(name.partition('/')[0] for name in sorted(self._keys()))
    return (self / name for name in found if name)

  def glob(self, pattern: str) -> Iterator[Self]:
    """The files and folders in this folder whose names match; `pattern` has no slash."""
    return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

  def read_bytes(self) -> bytes:
    data, _ = self.read_version()
    if data is None:
      raise FileNotFoundError(2, 'No such object', self.url)
    return data

  def read_text(self, encoding: str = 'utf-8', errors: str = 'strict') -> str:
    return self.read_bytes().decode(encoding, errors)

  def read_version(self) -> tuple[bytes | None, bytes]:
    """(contents, version); the contents are None if there is no such object. The version is for `write_if`."""
    with self._asking('read'):
      found = self._store.read(self.key).result()
    return (bytes(found.value) if found.state == 'value' else None), found.stamp.generation

  def write_bytes(self, data: bytes) -> None:
    self.begin_write(data)()

  def begin_write(self, data: bytes):
    """The write has begun; calling the result waits for its end."""
    with self._asking('written'):
      written = self._store.write(self.key, data)

    def wait() -> None:
      with self._asking('written'):
        written.result()

    return wait

  def write_text(self, text: str, encoding: str = 'utf-8') -> None:
    self.write_bytes(text.encode(encoding))

  def touch(self) -> None:
    self.write_bytes(b'')

  def write_if(self, data: bytes, version: bytes) -> bytes | None:
    """Writes the object if it still has this version; the new version, or None if it has changed.

    If the answer to a write is lost, the request is repeated and refused because of the first one. So after a refusal
    the object is read: if it holds `data`, the write has happened. `data` must be unlike what any other writer writes.
    """
    with self._asking('written'):
      new = self._store.write(self.key, data, if_equal=version).result().generation
    if new:
      return new
    there, now = self.read_version()
    return now if there == data else None

  def create(self, data: bytes) -> None:
    """Writes an object that does not exist yet. Raises FileExistsError, and changes nothing, if it exists."""
    there, version = self.read_version()
    if there == data or (there is None and self.write_if(data, version)):
      return
    raise FileExistsError(17, 'it exists already, and another writer has written it', self.url)

  def remove_if(self, version: bytes) -> None:
    """Removes the object if it still has this version."""
    with self._asking('removed'):
      self._store.write(self.key, None, if_equal=version).result()

  def unlink(self, missing_ok: bool = True) -> None:
    if not missing_ok and not self.is_file():
      raise FileNotFoundError(2, 'No such object', self.url)
    with self._asking('removed'):
      self._store.write(self.key, None).result()

  def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing: folders appear with the first file in them."""

  def remove_tree(self) -> None:
    """Removes everything in this folder."""
    with self._asking('removed'):
      self._store.delete_range(self._range()).result()
      if left := self._keys():  # as for lists, a refusal may look like an empty folder
        raise PermissionError(f'{len(left)} objects are still there')

  def copy_tree(self, target: Self, last: str) -> None:
    """Everything in this folder is in `target` too; the object named `last`, if there is one, is copied last."""
    for name in sorted(self.names(), key=lambda name: (name == last, name)):
      (target / name).write_bytes((self / name).read_bytes())

  def check_reachable(self) -> None:
    """Raises StoreError within a minute if the bucket does not exist, refuses, or cannot be reached."""
    context = tensorstore.Context({key: RETRIES | {'max_retries': FIRST_RETRIES} for key in CONTEXT})
    with self._asking('read'):
      store = tensorstore.KvStore.open(spec_of(self.root), context=context).result()
      store.list(self._range(of='checkpoints/')).result(timeout=FIRST_SECONDS)

  @property
  def _store(self) -> tensorstore.KvStore:
    return _open(json.dumps(spec_of(self.root)), os.environ.get('TENSORSTORE_GCS_HTTP_URL'))

  def _range(self, of: str = '') -> tensorstore.KvStore.KeyRange:
    prefix = (f'{self.key}/' if self.key else '') + of
    return tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + '0' if prefix else '')  # '0' follows '/' in ASCII

  def _keys(self) -> list[str]:
    """The names of all objects below this folder."""
    start, end = self._range().inclusive_min, self._range().exclusive_max
    with self._asking('listed'):
      found = self._listed(start, end)
      # TensorStore 0.1 takes a refusal of gs:// (HTTP 400 to 404) for the end of the list. So the list is asked for
      # what follows until nothing does, and a refusal that lasts is found by a read, which raises it.
      while self.root.startswith('gs://') and (more := self._listed(max(found) + b'\0' if found else start, end)):
        found += more
      self._store.read(max(found, default=start + b'.'), byte_range=slice(0, 0)).result()
    return [name[len(start) :].decode(errors='surrogateescape') for name in found]

  def _listed(self, start: bytes, end: bytes) -> list[bytes]:
    return list(self._store.list(tensorstore.KvStore.KeyRange(start, end)).result())

  def _asking(self, what: str) -> contextlib.AbstractContextManager[None]:
    return refused(self.url, what)


@functools.cache
def _open(spec: str, _endpoint: str | None) -> tensorstore.KvStore:
  """The bucket of a spec, opened once; `_endpoint` is a part of what is opened that the spec of gs:// does not show."""
  return tensorstore.KvStore.open(json.loads(spec), context=_context()).result()


@functools.cache
def _context() -> tensorstore.Context:
  return tensorstore.Context(CONTEXT)
