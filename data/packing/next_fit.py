"""seqio's packing, for comparisons: pieces in order, a row ends with the first one that does not fit.

Groups of as many examples as the longest row has positions are packed on their own, and a row ends with its group.
Source: seqio utils.py (trim_and_pack_dataset). Unlike there nothing is trimmed: documents over a row are cut first.
"""

from collections.abc import Callable

import numpy as np

from data.objectives.tasks import Budget, Task
from data.packing.best_fit import cut_long
from data.packing.plan import Bins, Pieces, Stream


class NextFitPlanner:
  """A planner (packing/plan.py) of one task; `stream(shard)` are the documents of a shard. The same in every epoch."""

  variants = 1

  def __init__(self, stream: Callable[[int], Stream], task: Task, budget: Budget):
    self._stream, self._capacity = stream, budget.capacity(task)
    self._sides = list(zip(budget.costs(task), (budget.inputs_length, budget.targets_length), strict=True))
    self._group = max(budget.inputs_length, budget.targets_length)

  def plan(self, shard: int, variant: int) -> Bins:
    pieces = cut_long(self._stream(shard), self._capacity)
    sums = [np.concatenate([[0], np.cumsum(cost[pieces.lengths])]) for cost, room in self._sides if room]
    rooms = [room for _, room in self._sides if room]
    firsts, count = [0], len(pieces.lengths)
    while firsts[-1] < count:
      at = firsts[-1]
      fits = (int(own.searchsorted(own[at] + room, 'right')) - 1 for own, room in zip(sums, rooms, strict=True))
      firsts.append(min(*fits, (at // self._group + 1) * self._group, count))
    rows = np.repeat(np.arange(len(firsts) - 1), np.diff(firsts))
    return Bins(np.zeros(len(firsts) - 1, np.int8), np.array(firsts), Pieces(rows, *pieces[1:]))
