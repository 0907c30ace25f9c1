"""Which tokens of a store carry loss, if documents determine it: turns by their role, and text after its tags."""

import functools
from collections.abc import Callable

import numpy as np

from data.packing.plan import Pieces
from data.ragged import spread

SHARDS = 16  # number of shards that are cached


class ByDocument:
  """Numbers for each document of a store: a cache of `of_shard(shard)` -> int64[numbers, documents]. Picklable."""

  def __init__(self, store, of_shard: Callable[[int], np.ndarray]):
    self._firsts = np.array([shard.documents.start for shard in store.shards])
    self._of_shard = of_shard

  def __getstate__(self):
    return {name: value for name, value in self.__dict__.items() if name != '_kept'}

  @functools.cached_property
  def _kept(self) -> Callable[[int], np.ndarray]:
    return functools.lru_cache(SHARDS)(self._of_shard)

  def of(self, documents: np.ndarray) -> np.ndarray:
    """int64[numbers, documents] for these documents."""
    shards, found = np.searchsorted(self._firsts, documents, 'right') - 1, None
    for shard in np.unique(shards).tolist():
      own, numbers = shards == shard, self._kept(shard)
      found = np.empty((len(numbers), len(documents)), np.int64) if found is None else found
      found[:, own] = numbers[:, documents[own] - self._firsts[shard]]
    return found


def asked(pieces: Pieces, begins: np.ndarray) -> np.ndarray:
  """bool[tokens]: which tokens of the pieces carry loss: those at or after `begins[i]`, a position in the store.

  >>> asked(Pieces(*np.array([[0, 0], [0, 1], [10, 14], [4, 2]])), np.array([12, 14])).tolist()
  [False, False, True, True, True, True]
  """
  return spread(pieces.places, pieces.lengths) >= np.repeat(begins, pieces.lengths)
