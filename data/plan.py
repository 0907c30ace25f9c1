"""Which text goes in which row: the concat-split plan of an epoch.

The text of all documents is one stream. Rows are cut from it in order: a row takes whole documents while they fit,
then the beginning of the next one, which goes on in the next row. So every token is in exactly one row of an epoch, no
row crosses a document inside one example, and a plan is nothing but the places of its cuts. Each row has a task; tasks
are dealt in blocks that hold their exact rates, in an order drawn for each block and epoch, so text meets other tasks
in the next epoch. In training, rows of a task come in a random order. Documents stay in the store's order (shuffle them
when the store is made): rows are then near-contiguous reads.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from data.bits import permutation, philox
from data.ragged import spread
from data.tasks import Budget, Task, block_of

STUB = 8  # tokens; a shorter beginning or end of a cut document is avoided
_BLOCKS_AT_ONCE = 1024


class Pieces(NamedTuple):
  """int64 arrays over pieces: the stretch that each is of, its document, where it lies in the store, its length."""

  stretches: np.ndarray
  documents: np.ndarray
  places: np.ndarray
  lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stream:
  """The documents that rows are cut from.

  `begins` and `lengths` (int64[documents]) are where a document's text lies in the store, without the EOS that some
  objectives add on their own. Places in the stream count text tokens only.
  """

  begins: np.ndarray
  lengths: np.ndarray

  @functools.cached_property
  def ends(self) -> np.ndarray:
    return np.cumsum(self.lengths)

  @property
  def size(self) -> int:
    return int(self.ends[-1])

  def pieces(self, first: np.ndarray, last: np.ndarray) -> Pieces:
    """The pieces of stretches [first, last) of the stream, none of them empty, in order."""
    begin = np.searchsorted(self.ends, first, side='right')
    count = np.searchsorted(self.ends, last, side='left') - begin + 1
    documents = spread(begin, count)
    origin = self.ends[documents] - self.lengths[documents]
    left = np.maximum(np.repeat(first, count), origin)
    lengths = np.minimum(np.repeat(last, count), self.ends[documents]) - left
    stretches = np.repeat(np.arange(len(first)), count)
    places = self.begins[documents] + left - origin
    some = lengths > 0  # empty documents have no piece
    return Pieces(stretches[some], documents[some], places[some], lengths[some])


@dataclasses.dataclass(frozen=True)
class Plan:
  """The rows of one epoch. Row r holds the stream from `cuts[r]` to `cuts[r + 1]` under task `tasks[r]`.

  The p-th row of the epoch in training is row `order[p]`, which has the task that row p has: blocks keep their rates.
  """

  cuts: np.ndarray
  tasks: np.ndarray
  order: np.ndarray

  @property
  def num_rows(self) -> int:
    return len(self.tasks)


class Planner:
  """Makes the plan of an epoch: a pure function of the arguments and the epoch."""

  def __init__(
    self,
    stream: Stream,
    tasks: tuple[Task, ...],
    budget: Budget,
    *,
    seed: int,
    purpose: str,
    attend_across_documents: bool,
  ):
    self.stream, self.budget, self.seed, self.purpose = stream, budget, seed, purpose
    self._block = block_of([task.rate for task in tasks], 'objective rates')
    self._capacity = np.array([budget.capacity(task) for task in tasks])
    # Where documents do not matter, and where any cut fills a row, cuts follow from the tasks alone.
    self._uniform = attend_across_documents or all(task.kind == 'causal' for task in tasks)
    if not self._uniform:
      self._costs = [budget.costs(task) for task in tasks]

  def plan(self, epoch: int) -> Plan:
    cuts, tasks = self._cut_anywhere(epoch) if self._uniform else self._cut_by_document(epoch)
    return Plan(cuts, tasks, self._shuffle(tasks, epoch))

  def tasks_of_rows(self, epoch: int, start: int, count: int) -> np.ndarray:
    """int8[count]: the tasks of rows start, start + 1, …; every block of rows holds each task at its exact rate."""
    at_once = _BLOCKS_AT_ONCE * len(self._block)
    parts = [self._deal(epoch, k) for k in range(start // at_once, (start + count - 1) // at_once + 1)]
    skip = start - start // at_once * at_once
    return np.concatenate(parts)[skip : skip + count]

  def _deal(self, epoch: int, group: int) -> np.ndarray:
    if len(self._block) == 1:
      return np.zeros(_BLOCKS_AT_ONCE, np.int8)
    bits = philox(self.seed, self.purpose + ' tasks', epoch, group).random_raw(_BLOCKS_AT_ONCE * len(self._block))
    order = np.argsort(bits.reshape(_BLOCKS_AT_ONCE, -1), axis=1, kind='stable')
    return self._block[order].astype(np.int8).ravel()

  def _cut_anywhere(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row takes as much of the stream as its task can."""
    size = self.stream.size
    bound = -(-size // int(self._capacity.min()))
    tasks = self.tasks_of_rows(epoch, 0, bound)
    cuts = np.concatenate([[0], np.cumsum(self._capacity[tasks])])
    num_rows = int(np.searchsorted(cuts, size))
    return np.append(cuts[:num_rows], size), tasks[:num_rows]

  def _cut_by_document(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    cuts, tasks, place = [0], np.zeros(0, np.int8), 0
    cutters = [
      _Cutter(self.stream, encoder, decoder, self.budget, int(capacity))
      for (encoder, decoder), capacity in zip(self._costs, self._capacity, strict=True)
    ]
    while place < self.stream.size:
      if len(cuts) > len(tasks):
        tasks = np.append(tasks, self.tasks_of_rows(epoch, len(tasks), max(1024, len(tasks))))
        dealt = tasks.tolist()
      place = cutters[dealt[len(cuts) - 1]].cut(place)
      cuts.append(place)
    return np.array(cuts, np.int64), tasks[: len(cuts) - 1]

  def _shuffle(self, tasks: np.ndarray, epoch: int) -> np.ndarray:
    order = np.empty(len(tasks), np.int64)
    for task in np.unique(tasks):
      rows = np.flatnonzero(tasks == task)
      order[rows] = rows[permutation(self.seed, self.purpose + ' rows', epoch, int(task), size=len(rows))]
    return order


class _Cutter:
  """Fills one row of a task from any place of the stream. Costs are arrays over lengths 0 … longest + 1."""

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
