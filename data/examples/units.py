"""Units that are not cut to fill rows: pairs and conversations. A row takes whole ones.

They come in the order of the store while they fit, or each goes where the least room is left (best fit). A unit
that no row has room for loses its end (seqio's trim), the same in every epoch. Rows come in another order in each
epoch. What is lost is counted, and printed (`Losses`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data.packing.best_fit import fill
from data.packing.plan import Bins, Pieces
from data.ragged import spread, starts


class Units(NamedTuple):
  """The units of a shard: the documents that each has, what rows take of these, and what that is on each side of a row.

  `counts` is int64[units]; `documents` (their numbers in the store), `begins` and `lengths` (what is kept of them) are
  int64[documents]; each of `sides` is int64[units].
  """

  counts: np.ndarray
  documents: np.ndarray
  begins: np.ndarray
  lengths: np.ndarray
  sides: Sequence[np.ndarray]


class Losses(Protocol):
  """What a store loses to the length of rows; `any`: whether it does."""

  @property
  def any(self) -> bool: ...

  def __str__(self) -> str: ...


class UnitStream(Protocol):
  losses: Losses

  def shard(self, shard: int) -> Units: ...


@dataclasses.dataclass(frozen=True)
class UnitPlanner:
  """A planner (packing/plan.py) of units: the same rows in each epoch. `rooms` are the places of each side of a row;
  with `best_fit` the first side leads."""

  stream: UnitStream
  rooms: tuple[int, ...]
  best_fit: bool
  variants = 1

  def plan(self, shard: int, variant: int) -> Bins:
    units = self.stream.shard(shard)
    places = np.arange(len(units.counts))
    rows = fill(places, *zip(units.sides, self.rooms, strict=True)) if self.best_fit else self._in_order(units)
    order = np.argsort(rows, kind='stable')
    counts = units.counts[order]
    own = spread(starts(units.counts)[order], counts)
    listed = Pieces(np.repeat(rows[order], counts), *(values[own] for values in units[1:4]))
    firsts = np.searchsorted(listed.rows, np.arange(rows.max(initial=-1) + 2))
    return Bins(np.zeros(len(firsts) - 1, np.int8), firsts, listed)

  def _in_order(self, units: Units) -> np.ndarray:
    """int64[units]: the row that each unit goes to."""
    sums = [np.concatenate([[0], np.cumsum(side)]) for side in units.sides]
    cuts = [0]
    while cuts[-1] < len(units.counts):
      ends = (own.searchsorted(own[cuts[-1]] + room, 'right') for own, room in zip(sums, self.rooms, strict=True))
      cuts.append(max(int(min(ends)) - 1, cuts[-1] + 1))  # a unit that fits no row is an error of its features
    return np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
