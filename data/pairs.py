"""Pairs of inputs and targets: which go in which row, and the fields of such rows.

A pair is never cut in two: a row takes whole pairs, in the order of the store, while both sides fit. A side that is
longer than `objectives.pair_lengths` loses its end (seqio's trim), the same in every epoch; `PairStream.counts` says
how often. Rows come in another order in each epoch.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from data.features import Batch, decoder_features, encoder_decoder_features
from data.plan import Bins, Pieces
from data.ragged import Ragged, separate
from data.tasks import Budget


class PairCounts(NamedTuple):
  """How many pairs a store has, the most tokens of (inputs, targets), and how many of each are cut to that."""

  pairs: int
  longest: tuple[int, int]
  cut: tuple[int, int]


class PairStream:
  """The pairs of a store; `longest` is the most tokens that (inputs, targets) keep."""

  def __init__(self, store, longest: tuple[int, int]):
    self.store, self._longest = store, longest
    whole = np.diff(store.offsets).reshape(-1, 2)
    inputs, targets = (np.minimum(whole, longest) < whole).sum(0).tolist()
    self.counts = PairCounts(len(whole), longest, (inputs, targets))

  def shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """(where inputs and targets of each pair begin, how many tokens they keep): int64[pairs, 2]."""
    offsets = self.store.offsets_of(shard)
    return offsets[:-1].reshape(-1, 2), np.minimum(np.diff(offsets).reshape(-1, 2), self._longest)


@dataclasses.dataclass(frozen=True)
class PairPlanner:
  """A planner (data/plan.py) of pairs: the same rows in each epoch."""

  stream: PairStream
  budget: Budget
  variants = 1

  def plan(self, shard: int, variant: int) -> Bins:
    begins, lengths = self.stream.shard(shard)
    cuts = self._cuts(lengths)
    documents = self.stream.store.shards[shard].documents.start + np.arange(lengths.size)
    rows = np.repeat(np.arange(len(cuts) - 1), 2 * np.diff(cuts))
    return Bins(np.zeros(len(cuts) - 1, np.int8), 2 * cuts, Pieces(rows, documents, begins.ravel(), lengths.ravel()))

  def _cuts(self, lengths: np.ndarray) -> np.ndarray:
    budget = self.budget
    sides = list(lengths.T) if budget.inputs_length else [lengths.sum(1)]
    rooms = [room for room in (budget.inputs_length, budget.targets_length) if room]
    sums = [np.concatenate([[0], np.cumsum(side)]) for side in sides]
    cuts = [0]
    while cuts[-1] < len(lengths):
      ends = (own.searchsorted(own[cuts[-1]] + room, 'right') for own, room in zip(sums, rooms, strict=True))
      cuts.append(max(int(min(ends)) - 1, cuts[-1] + 1))  # a pair that fits no row is an error of its features
    return np.array(cuts, np.int64)


class PairMaker:
  """Tokens of pairs -> the fields of rows, as `make.RowMaker` does for text; nothing is left to chance."""

  def __init__(self, budget: Budget):
    self._budget = budget

  def make(self, tokens: Ragged, rows: np.ndarray, tasks: np.ndarray, _bits) -> Batch:
    """Fields of `len(tasks)` rows: pieces 2i (inputs) and 2i + 1 (targets) are a segment of row `rows[2i]`."""
    inputs, targets = separate(tokens)
    length = self._budget.targets_length
    if self._budget.inputs_length:
      return encoder_decoder_features(inputs, targets, rows[::2], len(tasks), self._budget.inputs_length, length)
    return decoder_features(inputs, targets, rows[::2], len(tasks), length)


def sample_pairs(store, longest: tuple[int, int], count: int) -> list[tuple[list[int], list[int]]]:
  """(inputs as a row holds them, targets whole but for their EOS) of at most `count` pairs, taken evenly all along."""
  begins, lengths = store.offsets[:-1].reshape(-1, 2), np.diff(store.offsets).reshape(-1, 2)
  chosen = np.arange(min(count, len(begins))) * len(begins) // min(count, len(begins))
  keep = np.stack([np.minimum(lengths[:, 0], longest[0]), lengths[:, 1] - 1], 1)[chosen]
  found = store.read(list(zip(begins[chosen].ravel().tolist(), keep.ravel().tolist(), strict=True)))
  return [(inputs.tolist(), targets.tolist()) for inputs, targets in zip(found[::2], found[1::2], strict=True)]
