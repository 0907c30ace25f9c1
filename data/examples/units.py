"""Units that are not split to fill rows: pairs and conversations. A row contains whole units.

Units are placed in the order of the store as long as they fit, or each in the row with the least sufficient room (best
fit). A unit that is longer than a row is cut at its end (seqio's trim), in the same way in every epoch. The order of
rows differs between epochs. What is cut is counted and printed (`Losses`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from data.packing.best_fit import fill
from data.packing.plan import Bins, Pieces
from data.ragged import spread, starts


class Units(NamedTuple):
  """The units of a shard, cut for rows.

  `counts`, int64[units], is the number of documents in each unit. `documents` (their numbers in the store), `begins`
  and `lengths` (the part of each document that is kept) are int64[documents]. Each of `sides`, int64[units], is the
  number of tokens of a unit on one side of a row.
  """

  counts: np.ndarray
  documents: np.ndarray
  begins: np.ndarray
  lengths: np.ndarray
  sides: Sequence[np.ndarray]


@runtime_checkable
class Losses(Protocol):
  """How much of a store is cut or left out because rows are too short; `any` is False if nothing is."""

  @property
  def any(self) -> bool: ...

  def __str__(self) -> str: ...


@runtime_checkable
class UnitStream(Protocol):
  losses: Losses

  def shard(self, shard: int) -> Units: ...


@dataclasses.dataclass(frozen=True)
class UnitPlanner:
  """A planner (packing/plan.py) of units: the same rows in each epoch. `rooms` are the lengths of the sides of a row;
  `best_fit` compares the room left on the first side."""

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
    """int64[units]: the row of each unit."""
    sums = [np.concatenate([[0], np.cumsum(side)]) for side in units.sides]
    cuts = [0]
    while cuts[-1] < len(units.counts):
      ends = (own.searchsorted(own[cuts[-1]] + room, 'right') for own, room in zip(sums, self.rooms, strict=True))
      cuts.append(max(int(min(ends)) - 1, cuts[-1] + 1))  # a unit that fits in no row raises an error in its features
    return np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
