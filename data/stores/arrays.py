"""The arrays of a store, through TensorStore, on disks and object stores: append, and read in checksummed chunks.

Arrays are zarr3, `sharding_indexed`: files of 8 Mi elements in chunks of 64 Ki, each chunk with zstd and crc32c, so
that reading a flipped bit is an error.
"""

import collections
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorstore

from data.buckets import CONTEXT, spec_of
from data.errors import DataError
from data.stores.paths import absolute, is_local, local_path, plain_path, with_names

FILE, CHUNK = 2**23, 2**16  # elements; a file is held in memory while it is written
CACHE_BYTES = 2**27  # of decoded chunks, for each open array
LONGEST_WRITE = 30.0  # seconds
RESTORE = 'Nothing was changed; restore the store from a copy, or prepare it again.'
# The pool holds only the files' indexes. Each array keeps its decoded chunks, so reading one calls no TensorStore code.
_CONTEXT = tensorstore.Context({'cache_pool': {'total_bytes_limit': 2**24}, **CONTEXT})


def place_of(path: str | os.PathLike[str], name: str) -> str:
  """The location of the file `name` of a store, for messages: a URL, or an absolute path on a local disk.

  >>> place_of('gs://bucket/store/', 'manifest.json'), place_of('/a%20b', 'manifest.json')
  ('gs://bucket/store/manifest.json', '/a%20b/manifest.json')
  """
  base = absolute(local_path(path)) if is_local(path) else os.fspath(path)
  return f'{base.rstrip("/")}/{name}'


def is_inside(name: str) -> bool:
  """Whether `name`, a file or folder of a store ('' is the store itself), lies inside the store's folder.

  >>> [is_inside(name) for name in ('', 'tokens/', 'scores/my-score.2/', 'scores/../../x', '/etc', 'a//b')]
  [True, True, True, False, False, False]
  """
  return not name or all(re.fullmatch(r'\w[\w.-]*(?<!\.__lock)', part) for part in name.removesuffix('/').split('/'))


def _kvstore(path: str | os.PathLike[str], name: str = '') -> str | dict[str, Any]:
  """TensorStore's spec for a store, or for a folder in it.

  A local path is passed as a path, because `%`, `#` and `?` have a meaning in a URL. Raises DataError for a name that
  leads out of the store, which a damaged manifest may contain.
  """
  if not is_inside(name):
    raise DataError(f'{name!r} is not a valid name inside {os.fspath(path)}. {RESTORE}', 'DATA-CORRUPT')
  if is_local(path):
    return {'driver': 'file', 'path': f'{plain_path(local_path(path)).rstrip("/")}/{name}'}
  return spec_of(place_of(path, name))


def _open_files(path: str | os.PathLike[str]) -> tensorstore.KvStore:
  return tensorstore.KvStore.open(_kvstore(path), context=_CONTEXT).result()


def _written(path: str | os.PathLike[str], write: Callable[[], Any]):
  """The result of the future that `write()` starts; an error of the disk or bucket is raised as a DataError."""
  try:
    return _awaited(write())
  except (ValueError, OSError) as error:
    what = 'the disk' if is_local(path) else 'its bucket, and the credentials'
    raise DataError(f'{os.fspath(path)} cannot be written: {_first_line(error)}. Check {what}.') from error


def _awaited(future: Any):
  """The result of a future of TensorStore. An interrupt (Ctrl-C) is raised when the write has ended, `LONGEST_WRITE`
  seconds later at most: in its thread it would create again the folders that are removed meanwhile.
  """
  try:
    return future.result()
  except KeyboardInterrupt:
    end = time.monotonic() + LONGEST_WRITE
    while not future.done() and time.monotonic() < end:
      time.sleep(0.01)
    raise


def write_file(path: str | os.PathLike[str], name: str, value: bytes) -> None:
  _written(path, lambda: _open_files(path).write(name, value))


def delete_files(path: str | os.PathLike[str], names: Sequence[str]) -> None:
  """Deletes these files of a store; a name that ends with / is a folder."""
  store = _open_files(path)
  for name in names:
    end = name[:-1] + '0' if name.endswith('/') else name + '\0'  # '0' follows '/' in ASCII
    store.delete_range(tensorstore.KvStore.KeyRange(name, end)).result()


def read_file(path: str | os.PathLike[str], name: str) -> bytes | None:
  """The contents, or None if there is no such file."""
  found = _read(path, name, lambda: _open_files(path).read(name).result())
  return found.value if found.state == 'value' else None


def has_file(path: str | os.PathLike[str], name: str) -> bool:
  found = _read(path, name, lambda: _open_files(path).read(name, byte_range=slice(0, 0)).result())
  return found.state == 'value'


def _read(path: str | os.PathLike[str], name: str, read: Callable):
  try:
    return read()
  except ValueError as error:
    raise DataError(
      f'{place_of(path, name)} cannot be read: {_first_line(error)}. Check the path or URL, and credentials.'
    ) from error


class Watch:
  """Detects that a file has changed since this object was made: one small request, 0.1 ms on a disk."""

  def __init__(self, path: str | os.PathLike[str], name: str):
    self._path, self._name = path, name
    self._files = _read(path, name, lambda: _open_files(path))
    self._seen = self._ask().stamp.generation

  def changed(self) -> bool:
    return self._ask(if_not_equal=self._seen).state != 'unspecified'

  def _ask(self, **conditions):
    return _read(self._path, self._name, lambda: self._files.read(self._name, **conditions).result())


def _first_line(error: Exception) -> str:
  return re.sub(r" \[[\w-]+='.*", '', with_names(str(error)).splitlines()[0])[:300]  # without HTTP headers


def little(values: np.ndarray, dtype: str) -> np.ndarray:
  """`values` in little-endian byte order, as they are hashed and stored."""
  return np.ascontiguousarray(values, np.dtype(dtype).newbyteorder('<'))


def sha256(values: np.ndarray, dtype: str) -> str:
  return hashlib.sha256(little(values, dtype)).hexdigest()


class Appender:
  """Writes an array of unknown length file by file; holds at most one file in memory."""

  def __init__(self, path: str | os.PathLike[str], name: str, dtype: str):
    spec = _array_spec(path, name, dtype)
    # A writer that was killed may have left files on an object store; without a manifest they are not a store.
    create = lambda: tensorstore.open(spec, create=True, delete_existing=True, context=_CONTEXT)
    self._path, self._array = path, _written(path, create)
    self._buffer = np.empty(FILE, np.dtype(dtype).newbyteorder('<'))  # pages that are never touched take no memory
    self._num_pending, self.length = 0, 0
    self.dtype = dtype

  def append(self, values: np.ndarray) -> None:
    while len(values):
      part = values[: len(self._buffer) - self._num_pending]
      self._buffer[self._num_pending : self._num_pending + len(part)] = part
      self._num_pending += len(part)
      if self._num_pending == len(self._buffer):
        self._flush()
      values = values[len(part) :]

  def _flush(self) -> None:
    end = self.length + self._num_pending
    array = _written(self._path, lambda: self._array.resize(exclusive_max=[end], resize_metadata_only=True))
    values = self._buffer[: self._num_pending]
    # The next line waits for the write, so the buffer is not reused before it ends.
    write = lambda: array[self.length : end].write(values, can_reference_source_data_indefinitely=True)
    _written(self._path, write)
    self.length, self._num_pending = end, 0

  def close(self) -> None:
    self._flush()


def _array_spec(path, name: str, dtype: str) -> dict[str, Any]:
  inner = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'zstd', 'configuration': {'level': 1}},
    {'name': 'crc32c'},
  ]
  chunks = {'chunk_shape': [CHUNK], 'codecs': inner}
  return {
    'driver': 'zarr3',
    'kvstore': _kvstore(path, name + '/'),
    'metadata': {
      'shape': [0],
      'data_type': dtype,
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [FILE]}},
      'codecs': [{'name': 'sharding_indexed', 'configuration': chunks}],
    },
  }


class Column(Appender):
  """An array with one value per document. Values appended since the last `take_sha256` are held in memory."""

  def __init__(self, path: str | os.PathLike[str], name: str, dtype: str):
    super().__init__(path, name, dtype)
    self._held = np.zeros(0, dtype)

  def append(self, values: np.ndarray) -> None:
    super().append(values)
    self._held = np.concatenate([self._held, little(values, self.dtype)])

  def take_sha256(self, count: int) -> str:
    """The hash of the next `count` held values, which are released."""
    taken, self._held = self._held[:count], self._held[count:]
    return sha256(taken, self.dtype)


class Array:
  """Reads an array and caches the most recently used chunks (CACHE_BYTES). Picklable; threads may share one.

  Raises DataError (DATA-CORRUPT), naming the file, if a file is missing or a checksum fails.
  """

  def __init__(self, path: str, name: str):
    self.path, self.name = path, name
    self._reopen()

  def _reopen(self) -> None:
    spec = {
      'driver': 'zarr3', 'kvstore': _kvstore(self.path, self.name + '/'), 'recheck_cached_data': 'open',
      'fill_missing_data_reads': False,  # a missing file is an error, not zeros
    }  # fmt: skip
    self._array = self._checked(lambda: tensorstore.open(spec, read=True, context=_CONTEXT).result())
    self._chunks: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
    self._num_bytes = self.num_fetched = 0
    self._lock = threading.Lock()

  def __getstate__(self):
    return {'path': self.path, 'name': self.name}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._reopen()

  def __len__(self) -> int:
    return self._array.shape[0]

  @property
  def dtype(self) -> str:
    return self._array.dtype.name

  def _checked(self, read: Callable):
    try:
      return read()
    except ValueError as error:
      raise DataError(f'{self.path}: {_first_line(error)}. {RESTORE}', 'DATA-CORRUPT') from error

  def whole(self, places: range) -> np.ndarray:
    """The values at these positions, without the cache: for data that is read once."""
    return self._checked(self._array[places.start : places.stop].read().result)

  def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The values of each (start, length). Missing chunks are fetched concurrently."""
    firsts = [start // CHUNK for start, _ in ranges]
    lasts = [max(start + length - 1, start) // CHUNK for start, length in ranges]
    with self._lock:
      chunks = self._fetch({k for first, last in zip(firsts, lasts, strict=True) for k in range(first, last + 1)})
    return [
      _slice(chunks, first, last, start - first * CHUNK, length)
      for (start, length), first, last in zip(ranges, firsts, lasts, strict=True)
    ]

  def _fetch(self, wanted: set[int]) -> dict[int, np.ndarray]:
    missing = sorted(wanted - self._chunks.keys())
    futures = [self._array[k * CHUNK : min((k + 1) * CHUNK, len(self))].read() for k in missing]
    for k, future in zip(missing, futures, strict=True):
      self._chunks[k] = self._checked(future.result)
      self._num_bytes += self._chunks[k].nbytes
      self.num_fetched += 1
    found = {k: self._chunks[k] for k in wanted}
    for k in wanted:
      self._chunks.move_to_end(k)
    while self._num_bytes > CACHE_BYTES:
      self._num_bytes -= self._chunks.popitem(last=False)[1].nbytes
    return found


def _slice(chunks: dict[int, np.ndarray], first: int, last: int, start: int, length: int) -> np.ndarray:
  if first == last:
    return chunks[first][start : start + length].astype(np.int32)
  whole = np.concatenate([chunks[k] for k in range(first, last + 1)])
  return whole[start : start + length].astype(np.int32)
