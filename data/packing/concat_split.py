"""Concat-split: the text of a shard is one stream, and rows are cut from it in order.

A row takes whole documents while they fit, then the start of the next one, which continues in the next row. So every
token is in exactly one row, no row crosses a document inside one example, and a plan is just the positions of its
cuts. Each row has a task, dealt in blocks that hold their exact rates, others in each variant. Documents stay in the
store's order (shuffle them when the store is made): rows are then near-contiguous reads.
"""

from collections.abc import Callable

import numpy as np

from data.objectives.tasks import Budget, Task, block_of
from data.packing.order import Deal
from data.packing.plan import Cuts, Stream

STUB = 8  # tokens; a shorter beginning or end of a cut document is avoided
VARIANTS = 8  # different plans of a shard: for this many epochs text meets other tasks, then they repeat


class ConcatSplitPlanner:
  """A planner (data/packing/plan.py); `stream(shard)` are the documents of a shard."""

  def __init__(
    self,
    stream: Callable[[int], Stream],
    tasks: tuple[Task, ...],
    budget: Budget,
    *,
    seed: int,
    purpose: str,
    attend_across_documents: bool,
  ):
    self.variants = VARIANTS if len(tasks) > 1 else 1
    self._stream, self._budget = stream, budget
    self._deal = Deal(block_of([task.rate for task in tasks], 'objective rates'), seed, purpose + ' tasks of cuts')
    self._capacity = np.array([budget.capacity(task) for task in tasks])
    # Where documents do not matter, and where any cut fills a row, cuts follow from the tasks alone.
    self._uniform = attend_across_documents or all(task.kind == 'causal' for task in tasks)
    if not self._uniform:
      self._costs = [budget.costs(task) for task in tasks]

  def plan(self, shard: int, variant: int) -> Cuts:
    stream = self._stream(shard)
    cut = self._cut_anywhere if self._uniform else self._cut_by_document
    return Cuts(*cut(stream, shard, variant), stream)

  def _tasks(self, shard: int, variant: int, start: int, count: int) -> np.ndarray:
    return self._deal.at(np.arange(start, start + count), variant, shard)[0].astype(np.int8)

  def _cut_anywhere(self, stream: Stream, shard: int, variant: int) -> tuple[np.ndarray, np.ndarray]:
    """(task of each row, cuts): each row takes as much of the stream as its task can."""
    bound = -(-stream.size // int(self._capacity.min()))
    tasks = self._tasks(shard, variant, 0, bound)
    cuts = np.concatenate([[0], np.cumsum(self._capacity[tasks])])
    num_rows = int(np.searchsorted(cuts, stream.size))
    return tasks[:num_rows], np.append(cuts[:num_rows], stream.size)

  def _cut_by_document(self, stream: Stream, shard: int, variant: int) -> tuple[np.ndarray, np.ndarray]:
    cuts, tasks, place, dealt = [0], np.zeros(0, np.int8), 0, []
    cutters = [
      _Cutter(stream, encoder, decoder, self._budget, int(capacity))
      for (encoder, decoder), capacity in zip(self._costs, self._capacity, strict=True)
    ]
    while place < stream.size:
      if len(cuts) > len(tasks):
        tasks = np.append(tasks, self._tasks(shard, variant, len(tasks), max(1024, len(tasks))))
        dealt = tasks.tolist()
      place = cutters[dealt[len(cuts) - 1]].cut(place)
      cuts.append(place)
    return tasks[: len(cuts) - 1], np.array(cuts, np.int64)


class _Cutter:
  """Fills one row of a task from any position of the stream. Costs are arrays over lengths 0 … longest + 1."""

  def __init__(self, stream: Stream, encoder: np.ndarray, decoder: np.ndarray, budget: Budget, capacity: int):
    self._ends, self._capacity = stream.ends, capacity
    sides = [(encoder, budget.inputs_length), (decoder, budget.targets_length)]
    self._sides = [(cost.tolist(), room) for cost, room in sides if room]
    capped = np.minimum(stream.lengths, len(encoder) - 1)
    # Costs of the first n documents; one that does not fit an empty row costs more than a row here too.
    self._sums = [np.concatenate([[0], np.cumsum(c[capped])]) for c, room in sides if room]
    # The longest beginning of a document that fits what is left.
    self._fits = [(np.searchsorted(c, np.arange(room + 1), side='right') - 1).tolist() for c, room in sides if room]

  def cut(self, place: int) -> int:
    """Where the row that begins at `place` ends: the beginning of the next row."""
    document = int(self._ends.searchsorted(place, side='right'))
    end = int(self._ends[document])
    if end - place > self._capacity:
      return place + _avoid_stub(self._capacity, end - place, at_least=1)
    left = [room - cost[end - place] for cost, room in self._sides]
    document += 1
    last = min(
      int(sums.searchsorted(sums[document] + room, side='right')) - 1
      for sums, room in zip(self._sums, left, strict=True)
    )
    if last >= len(self._ends):
      return int(self._ends[-1])
    place = int(self._ends[last - 1])
    fit = min(
      fits[room - int(sums[last] - sums[document])]
      for fits, sums, room in zip(self._fits, self._sums, left, strict=True)
    )
    return place + _avoid_stub(fit, int(self._ends[last]) - place, at_least=STUB)


def _avoid_stub(fit: int, length: int, at_least: int) -> int:
  """How much of a document of `length` to put where `fit` < length tokens fit, so that neither part is a stub."""
  best = min(fit, length - STUB)
  if best >= STUB:
    return best
  return fit if at_least < STUB else 0
