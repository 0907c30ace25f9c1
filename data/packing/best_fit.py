"""Best-fit decreasing: no document that fits a row is cut, and rows are nearly full.

Longer documents are cut in full rows and a remainder. Then pieces, longest first, go each to the row with the least
room that still holds it. Source: Ding et al. 2024, arXiv:2404.10830 ("Fewer truncations improve language modeling").
"""

from collections.abc import Callable

import numpy as np

from data.objectives.tasks import Budget, Task
from data.packing.plan import Bins, Pieces, Stream
from data.ragged import starts

STUB = 8  # tokens; a shorter end of a cut document is made longer at the cost of the piece before it
TRIES = 32  # rows of different room looked at for a piece of two sides, before it gets a row of its own


class BestFitPlanner:
  """A planner (packing/plan.py) of one task; `stream(shard)` are the documents of a shard. The same in every epoch."""

  variants = 1

  def __init__(self, stream: Callable[[int], Stream], task: Task, budget: Budget):
    self._stream, self._capacity = stream, budget.capacity(task)
    sides = zip(budget.costs(task), (budget.inputs_length, budget.targets_length), strict=True)
    # The side that fills first leads.
    self._sides = sorted(((cost, room) for cost, room in sides if room), key=lambda side: -side[0][-1] / side[1])

  def plan(self, shard: int, variant: int) -> Bins:
    pieces = cut_long(self._stream(shard), self._capacity)
    bins = fill(pieces.lengths, *self._sides)
    order = np.lexsort((pieces.places, bins))
    firsts = np.searchsorted(bins[order], np.arange(bins.max(initial=-1) + 2))
    listed = pieces.take(order, bins[order])
    return Bins(np.zeros(len(firsts) - 1, np.int8), firsts, listed)


def cut_long(stream: Stream, capacity: int) -> Pieces:
  """The documents in order, those over `capacity` tokens cut in pieces of it and a remainder; `rows` counts pieces."""
  some = np.flatnonzero(stream.lengths)
  whole = stream.lengths[some]
  counts = -(-whole // capacity)
  documents, last = np.repeat(some, counts), np.cumsum(counts) - 1
  lengths = np.full(len(documents), capacity)
  lengths[last] = whole - (counts - 1) * capacity
  short = np.where(counts > 1, np.minimum(np.maximum(STUB - lengths[last], 0), capacity - STUB), 0).clip(0)
  lengths[last] += short
  lengths[last[short > 0] - 1] -= short[short > 0]
  before = starts(lengths) - np.repeat(starts(lengths)[starts(counts)], counts)
  return Pieces(np.arange(len(lengths)), stream.first + documents, stream.begins[documents] + before, lengths)


def fill(lengths: np.ndarray, leading, *following) -> np.ndarray:
  """int64[pieces]: the row of each piece. Sides are (positions taken, by length of a piece; room of a row)."""
  cost, room = leading
  sizes = cost[lengths]
  order = np.argsort(-sizes, kind='stable')
  bins, left = np.empty(len(lengths), np.int64), _Open(room)
  other = [(own[lengths[order]].tolist(), room) for own, room in following]
  others = other[0] if other else None
  for i, (piece, size) in enumerate(zip(order.tolist(), sizes[order].tolist(), strict=True)):
    bins[piece] = left.put(size) if others is None else left.put_two(size, others[0][i], others[1])
  return bins


class _Open:
  """Rows by the room that they have left; bit r of `_mask` is set if some row has room r."""

  def __init__(self, room: int):
    self._room, self._mask, self._number = room, 0, 0
    self._by_room: list[list[int]] = [[] for _ in range(room + 1)]
    self._second: list[int] = []  # room left on the other side

  def put(self, size: int) -> int:
    """The row for a piece; its room shrinks by `size`."""
    fitting = self._mask >> size
    return self._take(size + (fitting & -fitting).bit_length() - 1, size) if fitting else self._open(size)

  def put_two(self, size: int, second: int, second_room: int) -> int:
    """As `put`, for a piece that also takes `second` of `second_room` positions."""
    fitting, room = self._mask >> size, size
    for _ in range(TRIES):
      if not fitting:
        break
      step = (fitting & -fitting).bit_length() - 1
      room, fitting = room + step, fitting >> step
      row = self._by_room[room][-1]
      if self._second[row] >= second:
        self._second[row] -= second
        return self._take(room, size)
      room, fitting = room + 1, fitting >> 1
    self._second.append(second_room - second)
    return self._open(size)

  def _take(self, room: int, size: int) -> int:
    rows = self._by_room[room]
    row = rows.pop()
    if not rows:
      self._mask ^= 1 << room
    return self._keep(row, room - size)

  def _open(self, size: int) -> int:
    self._number += 1
    return self._keep(self._number - 1, self._room - size)

  def _keep(self, row: int, room: int) -> int:
    if room:
      self._by_room[room].append(row)
      self._mask |= 1 << room
    return row
