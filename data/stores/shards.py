"""The shards of a store: whole documents, at most a given number of tokens. They are cut and hashed during writing."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from data.errors import DataError
from data.stores.arrays import little

_COUNTS, _HASHES = ('documents', 'tokens'), ('offsets_sha256', 'tokens_sha256')


@dataclasses.dataclass(frozen=True)
class Shard:
  """Whole documents of a store that are planned together, and their tokens, as ranges of positions in the store."""

  documents: range
  tokens: range


class ShardCutter:
  """Cuts a stream of documents into shards of at most `limit` tokens; a longer unit becomes a shard of its own.

  A unit is never split between shards: a document, a pair or a conversation. `entries` are the manifest's entries of
  the shards cut so far. The result does not depend on how the documents are divided among calls of `add`.
  """

  def __init__(self, dtype: str, limit: int):
    self.entries: list[dict[str, Any]] = []
    self._dtype, self._limit = dtype, limit
    self._num_tokens = 0  # in all calls so far
    self._start = self._boundary = 0  # where the current shard begins; where its last complete unit ends
    self._ends: list[np.ndarray] = []  # where the current shard's documents end
    self._open_ends = np.zeros(0, np.int64)  # where the documents of the last, still incomplete unit end
    # Hashes of the shard up to its last complete unit; of all its tokens; of the tokens after that unit, which may
    # begin the next shard.
    self._closed, self._all, self._alone = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

  def add(self, tokens: np.ndarray, ends: np.ndarray, closes: np.ndarray) -> None:
    """Adds `tokens`. `ends` (int64, ascending) are the positions in the store at which documents end among them;
    `closes` (bool) says which of these documents end a unit."""
    first, tokens = self._num_tokens, little(tokens, self._dtype)
    units = len(self._open_ends) + np.flatnonzero(closes) + 1  # number of documents up to the end of each unit
    ends = np.concatenate([self._open_ends, ends])
    while len(units):
      fit = int(np.searchsorted(ends[units - 1], self._start + self._limit, 'right'))
      if not fit and self._boundary > self._start:
        self._cut()
        continue
      number = int(units[max(fit, 1) - 1])
      self._feed(tokens[self._num_tokens - first : int(ends[number - 1]) - first])
      self._close(ends[:number])
      ends, units = ends[number:], units[max(fit, 1) :] - number
    self._open_ends = ends
    rest = tokens[self._num_tokens - first :]
    self._feed(rest)
    self._alone.update(rest)

  def _feed(self, tokens: np.ndarray) -> None:
    self._all.update(tokens)
    self._num_tokens += len(tokens)

  def _close(self, ends: np.ndarray) -> None:
    self._ends.append(ends)
    self._boundary = int(ends[-1])
    self._closed, self._alone = self._all.copy(), hashlib.sha256()

  def _cut(self) -> None:
    """Ends the shard after its last complete unit; the tokens after that begin the next shard."""
    ends = np.concatenate([np.array([self._start]), *self._ends])
    digest = hashlib.sha256(little(ends, 'int64')).hexdigest()
    counts = dict(zip(_COUNTS, (len(ends) - 1, self._boundary - self._start), strict=True))
    self.entries.append(counts | dict(zip(_HASHES, (digest, self._closed.hexdigest()), strict=True)))
    self._start, self._ends, self._all = self._boundary, [], self._alone.copy()

  def close(self) -> None:
    """Ends the last shard."""
    if self._boundary > self._start:
      self._cut()


def parse_shards(where: str, entries: list[Any]) -> tuple[Shard, ...]:
  """The shards that a manifest lists. Raises DataError for an invalid entry."""
  shards, documents, tokens = [], 0, 0
  for i, entry in enumerate(entries):
    kinds = dict.fromkeys(_COUNTS, int) | dict.fromkeys(_HASHES, str)
    bad = [key for key, kind in kinds.items() if not isinstance(entry, dict) or type(entry.get(key)) is not kind]
    if bad:
      found = entry.get(bad[0]) if isinstance(entry, dict) else entry
      raise DataError(
        f'{where} has shards[{i}].{bad[0]}={found!r}, expected {kinds[bad[0]].__name__}. Nothing was changed; restore '
        'the store from a copy, or prepare it again.', 'DATA-CORRUPT',
      )  # fmt: skip
    ends = documents + entry['documents'], tokens + entry['tokens']
    shards.append(Shard(range(documents, ends[0]), range(tokens, ends[1])))
    documents, tokens = ends
  return tuple(shards)
