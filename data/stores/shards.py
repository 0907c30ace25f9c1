"""The shards of a store: whole documents, at most so many tokens. They are cut, and hashed, as the store is written."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from data.errors import DataError
from data.stores.arrays import little

_COUNTS, _HASHES = ('documents', 'tokens'), ('offsets_sha256', 'tokens_sha256')


@dataclasses.dataclass(frozen=True)
class Shard:
  """Whole documents of a store that are planned together, and the tokens that they have."""

  documents: range
  tokens: range


class ShardCutter:
  """Cuts a stream of documents in shards of at most `limit` tokens; a unit that is longer is a shard of its own.

  A unit is what stays together: a document, a pair or a conversation. `entries` are the shards so far, as the manifest
  has them. How documents come in (in which calls of `add`) changes nothing.
  """

  def __init__(self, dtype: str, limit: int):
    self.entries: list[dict[str, Any]] = []
    self._dtype, self._limit = dtype, limit
    self._num_tokens = 0  # of all calls
    self._start = self._boundary = 0  # where the shard begins; where its last unit ends
    self._ends: list[np.ndarray] = []  # of the shard's documents
    self._open_ends = np.zeros(0, np.int64)  # of documents of a unit that is not whole
    # Of the shard up to its last unit; of all that came; of what came after the last unit, which may begin a shard.
    self._closed, self._all, self._alone = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

  def add(self, tokens: np.ndarray, ends: np.ndarray, closes: np.ndarray) -> None:
    """Tokens of documents; where in the store documents end that end among them (int64, ascending); which of these
    end a unit (bool)."""
    first, tokens = self._num_tokens, little(tokens, self._dtype)
    units = len(self._open_ends) + np.flatnonzero(closes) + 1  # how many documents there are up to the end of each
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
    """Ends a shard with its last unit; what came after it begins the next one."""
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
  """The shards that a manifest lists. Raises DataError where an entry is none."""
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
