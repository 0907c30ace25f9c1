"""Random tokens in place of a store, for benchmarks and tests that must not depend on a disk."""

import numpy as np

from data.bits import philox
from data.stores.shards import Shard
from data.stores.vocabulary import UNKNOWN

_DOCUMENT, _NUM_DOCUMENTS = 4096, 1024


class SyntheticStore:
  """Uniformly random pieces in 1024 documents of 4096 tokens, with the reading interface of `Store`."""

  append_eos, kind = False, 'text'

  def __init__(self, pieces: int, seed: int):
    self.path, self.fingerprint = 'synthetic', f'synthetic-{pieces}-{seed}'
    self.num_documents, self.num_tokens = _NUM_DOCUMENTS, _DOCUMENT * _NUM_DOCUMENTS
    self.offsets = np.arange(_NUM_DOCUMENTS + 1, dtype=np.int64) * _DOCUMENT
    self.shards = (Shard(range(_NUM_DOCUMENTS), range(self.num_tokens)),)
    bits = philox(seed, 'synthetic').random_raw(self.num_tokens // 2).view(np.uint32)
    self._tokens = (bits % np.uint32(pieces - UNKNOWN - 1) + np.uint32(UNKNOWN + 1)).astype(np.int32)

  def offsets_of(self, shard: int) -> np.ndarray:
    """int64[documents + 1]: where each document of the (only) shard begins, and where the last one ends."""
    return self.offsets

  def read(self, ranges) -> list[np.ndarray]:
    """int32 tokens of each (start, length)."""
    return [self._tokens[start : start + length] for start, length in ranges]
