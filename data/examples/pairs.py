"""Pairs of inputs and targets: how they are cut for rows, and the fields of such rows.

A side that is longer than `objectives.pair_lengths` is cut at its end (data/examples/units.py).
"""

from typing import NamedTuple

import numpy as np

from data.examples.units import Units
from data.objectives.features import Batch, decoder_features, encoder_decoder_features
from data.objectives.tasks import Budget
from data.packing.plan import Pieces
from data.ragged import Ragged, separate


class PairLosses(NamedTuple):
  """Number of pairs in a store, largest numbers of tokens of (inputs, targets), how many of each are cut to these."""

  pairs: int
  longest: tuple[int, int]
  cut: tuple[int, int]

  @property
  def any(self) -> bool:
    return sum(self.cut) > 0

  def __str__(self) -> str:
    sides = zip(('inputs', 'targets'), self.cut, self.longest, strict=True)
    cuts = (f'{cut:,} have {side} cut to {longest} tokens' for side, cut, longest in sides)
    return f'of its {self.pairs:,} pairs, ' + ', '.join(cuts)


class PairStream:
  """The pairs of a store; (inputs, targets) keep at most `longest` tokens. With `sides`, for an encoder-decoder, they
  fill two separate sides of a row; otherwise, for a decoder, they follow each other."""

  def __init__(self, store, longest: tuple[int, int], *, sides: bool):
    self.store, self._longest, self._sides = store, longest, sides
    whole = np.diff(store.offsets).reshape(-1, 2)
    inputs, targets = (np.minimum(whole, longest) < whole).sum(0).tolist()
    self.losses = PairLosses(len(whole), longest, (inputs, targets))

  def shard(self, shard: int) -> Units:
    offsets = self.store.offsets_of(shard)
    lengths = np.minimum(np.diff(offsets).reshape(-1, 2), self._longest)
    sides = list(lengths.T) if self._sides else [lengths.sum(1)]
    documents = np.array(self.store.shards[shard].documents)
    return Units(np.full(len(lengths), 2), documents, offsets[:-1], lengths.ravel(), sides)


class PairMaker:
  """Tokens of pairs -> the fields of rows, like `make.RowMaker` for text, but without random numbers."""

  def __init__(self, budget: Budget, first: int):
    self._budget, self._first = budget, first

  def asked(self, pieces: Pieces) -> np.ndarray:
    return np.repeat(np.arange(len(pieces.rows)) % 2 == 1, pieces.lengths)

  def segments(self, pieces: Pieces) -> np.ndarray:
    return np.arange(len(pieces.rows)) // 2 + 1

  def make(self, tokens: Ragged, pieces: Pieces, tasks: np.ndarray, _bits) -> Batch:
    """Fields of `len(tasks)` rows: pieces 2i (inputs) and 2i + 1 (targets) form a segment."""
    inputs, targets = separate(tokens)
    length, rows = self._budget.targets_length, pieces.rows
    if self._budget.inputs_length:
      lengths = self._budget.inputs_length, length
      return encoder_decoder_features(inputs, targets, rows[::2], len(tasks), *lengths, self._first)
    return decoder_features(inputs, targets, rows[::2], len(tasks), length, first=self._first)


def sample_pairs(store, longest: tuple[int, int], count: int) -> list[tuple[list[int], list[int]]]:
  """(inputs cut as in rows, whole targets without EOS) of at most `count` pairs, spread evenly over the store."""
  begins, lengths = store.offsets[:-1].reshape(-1, 2), np.diff(store.offsets).reshape(-1, 2)
  chosen = np.arange(min(count, len(begins))) * len(begins) // min(count, len(begins))
  keep = np.stack([np.minimum(lengths[:, 0], longest[0]), lengths[:, 1] - 1], 1)[chosen]
  found = store.read(list(zip(begins[chosen].ravel().tolist(), keep.ravel().tolist(), strict=True)))
  return [(inputs.tolist(), targets.tolist()) for inputs, targets in zip(found[::2], found[1::2], strict=True)]
