"""`pretrain data stats`: document lengths, frequent tokens and exact duplicates, from one pass over a store.

Memory holds one block of tokens, the offsets of one shard, and 8 bytes per document.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.stores.arrays import CHUNK
from data.stores.store import Store, open_store

STEP = 64 * CHUNK
PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
MOST_FREQUENT = 50


@dataclasses.dataclass(frozen=True)
class StoreStats:
  """`lengths[n]` documents have n tokens (EOS included); token t occurs `frequencies[t]` times; `num_duplicates`
  documents repeat the tokens of an earlier document."""

  store: Store
  lengths: dict[int, int]
  frequencies: np.ndarray
  num_duplicates: int

  def percentile(self, percent: int) -> int:
    """The smallest length that at least `percent` of the documents do not exceed."""
    sizes = sorted(self.lengths)
    reached = np.cumsum([self.lengths[size] for size in sizes])
    return sizes[int(np.searchsorted(reached, percent / 100 * reached[-1]))]

  def to_json(self) -> dict[str, Any]:
    tokenizer = self.store.tokenizer(0)
    common = np.argsort(-self.frequencies, kind='stable')[:MOST_FREQUENT]
    common = [int(t) for t in common if self.frequencies[t]]
    return {
      'store': self.store.path,
      'fingerprint': self.store.fingerprint,
      'num_tokens': self.store.num_tokens,
      'num_documents': self.store.num_documents,
      'length_percentiles': {str(p): self.percentile(p) for p in PERCENTILES},
      'length_histogram': self.histogram(),
      'duplicate_documents': self.num_duplicates,
      'duplicate_share': self.num_duplicates / self.store.num_documents,
      'pieces_used': int((self.frequencies > 0).sum()),
      'frequent_tokens': [
        {'id': t, 'piece': tokenizer.piece(t), 'count': int(self.frequencies[t])} for t in common
      ],
    }  # fmt: skip

  def histogram(self) -> list[dict[str, int]]:
    """The number of documents with `from` … `to` tokens, and of their tokens; the bins are powers of two."""
    found: dict[int, list[int]] = collections.defaultdict(lambda: [0, 0])
    for size, count in self.lengths.items():
      found[size.bit_length()][0] += count
      found[size.bit_length()][1] += count * size
    return [
      {'from': 2 ** (k - 1) if k else 0, 'to': 2**k - 1, 'documents': found[k][0], 'tokens': found[k][1]}
      for k in sorted(found)
    ]


def store_stats(path: str) -> StoreStats:
  """The statistics of a store, read from end to end. Raises DataError if it is damaged."""
  store = open_store(path)
  lengths: collections.Counter[int] = collections.Counter()
  frequencies = np.zeros(store.manifest['pieces'], np.int64)
  digests = np.empty(store.num_documents, np.uint64)
  for i, shard in enumerate(store.shards):
    offsets = store.offsets_of(i)
    sizes, counts = np.unique(np.diff(offsets), return_counts=True)
    lengths.update(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))
    digests[shard.documents.start : shard.documents.stop] = _digests(store, offsets, frequencies)
  duplicates = store.num_documents - len(np.unique(digests))
  return StoreStats(store, dict(lengths), frequencies, duplicates)


def _digests(store: Store, offsets: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
  """uint64 hash of each document's tokens; the tokens are counted into `frequencies`."""
  found, digest = [], _new()
  for first, tokens in _pieces(store, range(int(offsets[0]), int(offsets[-1]))):
    frequencies += np.bincount(tokens, minlength=len(frequencies))
    inside = offsets[1:][(offsets[1:] > first) & (offsets[1:] <= first + len(tokens))] - first
    for part in np.split(tokens, inside)[:-1]:
      digest.update(part.tobytes())
      found.append(digest.digest())
      digest = _new()
    digest.update(tokens[int(inside[-1]) if len(inside) else 0 :].tobytes())
  return np.frombuffer(b''.join(found), '<u8')


def _new() -> 'hashlib.blake2b':
  return hashlib.blake2b(digest_size=8)


def _pieces(store: Store, places: range) -> Iterator[tuple[int, np.ndarray]]:
  for first in range(places.start, places.stop, STEP):
    yield first, store.tokens(range(first, min(first + STEP, places.stop)))
