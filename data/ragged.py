"""Arrays of unequal lengths, end to end: what the vectorised parts of `data` hand to each other."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Ragged(NamedTuple):
  """`values` of all pieces one after another, and the `lengths` (int64) of the pieces."""

  values: np.ndarray
  lengths: np.ndarray

  def split(self) -> list[np.ndarray]:
    return np.split(self.values, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def join(pieces: Sequence[np.ndarray], dtype=np.int32) -> Ragged:
  """Pieces -> Ragged.

  >>> join([np.int32([1, 2]), np.int32([3])]).lengths.tolist()
  [2, 1]
  """
  lengths = np.array([len(piece) for piece in pieces], np.int64)
  return Ragged(np.concatenate([np.zeros(0, dtype), *pieces]).astype(dtype), lengths)


def starts(lengths: np.ndarray) -> np.ndarray:
  """Where each piece begins.

  >>> starts(np.array([2, 1, 4])).tolist()
  [0, 2, 3]
  """
  return np.cumsum(lengths) - lengths


def spread(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """`first[i], first[i] + 1, …` for each piece, `lengths[i]` numbers each: int64[sum(lengths)].

  >>> spread(np.array([10, 50]), np.array([3, 2])).tolist()
  [10, 11, 12, 50, 51]
  """
  return np.repeat(first - starts(lengths), lengths) + np.arange(lengths.sum())


def interleave(a: Ragged, b: Ragged) -> tuple[Ragged, np.ndarray]:
  """(a0 b0 a1 b1 … with one piece for each pair, bool[values]: True where a value comes from `a`)."""
  lengths = np.stack([a.lengths, b.lengths], 1).ravel()
  from_a = np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)
  values = np.empty(len(from_a), a.values.dtype)
  values[from_a], values[~from_a] = a.values, b.values
  return Ragged(values, a.lengths + b.lengths), from_a


def separate(pieces: Ragged) -> tuple[Ragged, Ragged]:
  """a0 b0 a1 b1 … -> (a0 a1 …, b0 b1 …): `interleave`, undone.

  >>> a, b = separate(join([np.int32([1, 2]), np.int32([3]), np.int32([4]), np.int32([5, 6])]))
  >>> a.values.tolist(), b.values.tolist()
  ([1, 2, 4], [3, 5, 6])
  """
  is_first = np.repeat(np.arange(len(pieces.lengths)) % 2 == 0, pieces.lengths)
  first, second = (Ragged(pieces.values[own], pieces.lengths[i::2]) for i, own in enumerate((is_first, ~is_first)))
  return first, second
