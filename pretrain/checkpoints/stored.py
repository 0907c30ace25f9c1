"""One array of a step, read a part at a time with TensorStore from the files that Orbax wrote."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore

from data.buckets import CONTEXT, spec_of
from pretrain.workdirs.folder import Folder
from pretrain.workdirs.store_path import StorePath

PART = 64 * 2**20  # bytes that are read at a time: TensorStore holds as much again while it unpacks them
LEAST_CACHE = 16 * 2**20  # bytes: for the index of the files

Place = tuple[int, ...]


def _files(folder: Folder) -> Any:
  if isinstance(folder, StorePath):
    return spec_of(f'{folder.url}/')
  return {'driver': 'file', 'path': f'{folder.resolve()}/'}


class Stored:
  """The array at `key` (params/decoder/…) of the step in `folder`: its shape, and its values when they are asked for.

  `corrupt` makes the error for files that cannot be read.
  """

  def __init__(self, folder: Folder, key: str, corrupt: Callable[[str], Exception]):
    self._spec = {
      'driver': 'zarr', 'path': key.replace('/', '.') + '/', 'recheck_cached_data': 'open',
      'kvstore': {'driver': 'ocdbt', 'base': _files(folder / 'state')},
    }  # fmt: skip
    self._corrupt = corrupt
    array = self._opened(LEAST_CACHE)
    self.shape: tuple[int, ...] = tuple(array.shape)
    self._chunk: tuple[int, ...] = tuple(array.chunk_layout.read_chunk.shape or ())
    self._dtype: np.dtype = array.dtype.numpy_dtype

  def parts(self, places: Iterable[Place]) -> Iterator[np.ndarray]:
    """The values at each place on the leading axes.

    Where a chunk has several places of the first axis, the array stays in memory meanwhile: each place would unpack it.
    """
    listed = list(places)
    shared = len(listed) > 1 and self._chunk[0] > 1
    array = self._opened(LEAST_CACHE + shared * self._bytes(self.shape))
    for place in listed:
      yield self._read(array, place)

  def all(self) -> np.ndarray:
    """All values."""
    return next(self.parts([()]))

  def _opened(self, cache: int) -> tensorstore.TensorStore:
    context = CONTEXT | {'cache_pool': {'total_bytes_limit': cache}, 'file_io_concurrency': {'limit': 4}}
    try:
      return tensorstore.open(self._spec, read=True, context=tensorstore.Context(context)).result()
    except (ValueError, OSError) as error:
      raise self._corrupt(str(error).splitlines()[0][:300]) from error

  def _read(self, array: tensorstore.TensorStore, place: Place) -> np.ndarray:
    found, own = np.empty(self.shape[len(place) :], self._dtype), array[place] if place else array
    for part in self._slices(found.shape, self._chunk[len(place) :]):
      source = own[part].translate_to[(0,) * found.ndim]
      try:
        tensorstore.array(found[part], copy=False).write(source).result()
      except (ValueError, OSError) as error:
        raise self._corrupt(str(error).splitlines()[0][:300]) from error
    return found

  def _slices(self, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Any]:
    """Parts of the first axis that consist of whole chunks, each about PART bytes."""
    if not shape:
      yield ...
      return
    step = chunk[0] * max(1, PART // max(1, self._bytes((chunk[0], *shape[1:]))))
    for begin in range(0, shape[0], step):
      yield slice(begin, min(begin + step, shape[0]))

  def _bytes(self, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * self._dtype.itemsize
