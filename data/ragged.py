"""Arrays of unequal lengths stored end to end, as the vectorised functions of `data` pass them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Ragged(NamedTuple):
  """`values` of all pieces one after another, and the `lengths` (int64) of the pieces."""

  values: np.ndarray
  lengths: np.ndarray

  def split(self) -> list[np.ndarray]:
    return np.split(self.values, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def join(pieces: Sequence[np.ndarray | Sequence[int]], dtype=np.int32) -> Ragged:
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


def first_of(pieces: Ragged, counts: np.ndarray) -> Ragged:
  """The first `counts[i]` values of each piece.

  >>> first_of(join([np.int32([1, 2, 3]), np.int32([4])]), np.array([2, 0])).values.tolist()
  [1, 2]
  """
  return Ragged(pieces.values[spread(starts(pieces.lengths), counts)], counts)


def where(pieces: Ragged, keep: np.ndarray) -> Ragged:
  """The pieces where `keep` (bool[pieces]) is True, empty ones in place of the others."""
  return Ragged(pieces.values[np.repeat(keep, pieces.lengths)], np.where(keep, pieces.lengths, 0))


def select(pieces: Ragged, own: np.ndarray) -> Ragged:
  """The pieces where `own` (bool[pieces]) is True, and no others."""
  return Ragged(pieces.values[np.repeat(own, pieces.lengths)], pieces.lengths[own])


def merge(parts: Sequence[tuple[np.ndarray, Ragged]]) -> Ragged:
  """`select`, undone: of each part, where its pieces stand in the whole (bool[pieces]), and the pieces."""
  lengths = np.empty(len(parts[0][0]), np.int64)
  for own, part in parts:
    lengths[own] = part.lengths
  values, begins = np.empty(lengths.sum(), parts[0][1].values.dtype), starts(lengths)
  for own, part in parts:
    values[spread(begins[own], part.lengths)] = part.values
  return Ragged(values, lengths)


def weave(parts: Sequence[Ragged]) -> Ragged:
  """a0 b0 c0 a1 b1 c1 …, with one piece for each (a, b, c): all parts have as many pieces.

  >>> weave([join([np.int32([1]), np.int32([2, 3])]), join([np.int32([4]), np.int32([])])]).values.tolist()
  [1, 4, 2, 3]
  """
  lengths = np.stack([part.lengths for part in parts], 1)
  begins = starts(lengths.ravel()).reshape(lengths.shape)
  values = np.empty(lengths.sum(), parts[0].values.dtype)
  for k, part in enumerate(parts):
    values[spread(begins[:, k], part.lengths)] = part.values
  return Ragged(values, lengths.sum(1))


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
