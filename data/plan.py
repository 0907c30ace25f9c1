"""Which tokens go to which row: every token of an epoch to exactly one, in blocks that hold each task's exact share.

A row has room for `inputs_length` and `targets_length` ids (for one stream, `targets_length` in all). It is filled with
whole documents in the order of the store; the last one is cut so that the row is full and goes on in the next row
(concat-split). Only a stub shorter than MIN_PIECE is not begun. The last row of an epoch is padded, nothing is dropped.
"""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.objectives import Task, largest_piece

MIN_PIECE = 8
MAX_BLOCK = 100_000


def generator(seed: int, purpose: int, *counter: int) -> np.random.Generator:
  """Random numbers that depend on these numbers alone: Philox with the key (seed, purpose)."""
  words = [0, *counter, *[0] * (3 - len(counter))]
  return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), purpose], counter=words))


TASK_ORDER, ROW_ORDER, EXAMPLE, SOURCE_ORDER, SYNTHETIC = range(1, 6)


def quotas(weights: Sequence[float]) -> np.ndarray:
  """The smallest whole numbers in the ratio of `weights` (to a thousandth): how often each comes in a block.

  >>> quotas([0.5, 0.25, 0.125, 0.125]).tolist()
  [4, 2, 1, 1]
  """
  total = sum(weights)
  shares = [Fraction(w / total).limit_denominator(1000) for w in weights]
  denominator = int(np.lcm.reduce([s.denominator for s in shares]))
  counts = np.array([int(s * denominator) for s in shares])
  if denominator > MAX_BLOCK or counts.min() < 1:
    raise ValueError(
      f'weights {list(weights)} have no common block of at most {MAX_BLOCK} rows; round them to thousandths.'
    )
  return counts // np.gcd.reduce(counts)


def block_choices(counts: np.ndarray, seed: int, purpose: int, epoch: int, first: int, num: int) -> np.ndarray:
  """int64[num, block]: in each of the blocks `first` .. `first + num`, choice c comes counts[c] times, shuffled."""
  block = np.repeat(np.arange(len(counts)), counts)
  rows = [
    generator(seed, purpose, epoch, i).random(len(block)).argsort(kind='stable') for i in range(first, first + num)
  ]
  return block[np.array(rows).reshape(num, len(block))]


@dataclasses.dataclass(frozen=True)
class Fit:
  """A task's costs over a row's room, tabulated."""

  inputs: np.ndarray  # cost of a piece of n tokens, n = 0 .. largest
  targets: np.ndarray
  most: np.ndarray  # the largest piece in a room of (inputs left, targets left) is min(most[0][a], most[1][b])
  largest: int

  @classmethod
  def of(cls, task: Task, inputs_length: int, targets_length: int) -> 'Fit':
    largest = largest_piece(task, inputs_length, targets_length)
    costs = np.array([(0, 0), *(task.costs(n) for n in range(1, largest + 1))])
    if inputs_length == 0:  # one stream: only the sum counts
      costs = np.stack([0 * costs[:, 0], costs.sum(1)], 1)
    size = max(inputs_length, targets_length) + 1
    # costs never fall as pieces grow, so the largest that fits is found by bisection
    most = np.stack([np.searchsorted(np.maximum.accumulate(c), np.arange(size), side='right') - 1 for c in costs.T])
    return cls(costs[:, 0], costs[:, 1], most, largest)


@dataclasses.dataclass(frozen=True)
class Plan:
  """One epoch of one source. Row r holds pieces `row_start[r]` .. `row_start[r + 1]`, each of one document."""

  piece_start: np.ndarray
  piece_length: np.ndarray
  row_start: np.ndarray
  row_task: np.ndarray
  order: np.ndarray  # the row that is trained on at each place of the epoch

  @property
  def num_rows(self) -> int:
    return len(self.row_task)

  def pieces(self, row: int) -> list[tuple[int, int]]:
    span = slice(self.row_start[row], self.row_start[row + 1])
    return list(zip(self.piece_start[span].tolist(), self.piece_length[span].tolist(), strict=True))


class Planner:
  """Makes the plan of each epoch of a source; the same for the same (offsets, tasks, room, seed, epoch)."""

  def __init__(self, offsets: np.ndarray, tasks: Sequence[Task], inputs_length: int, targets_length: int, seed: int):
    self._offsets, self._seed = offsets, seed
    self._room = (inputs_length, targets_length)
    self._counts = quotas([task.rate for task in tasks])
    self._fits = [Fit.of(task, inputs_length, targets_length) for task in tasks]
    lengths = np.diff(offsets)
    # What the documents before each one cost whole, for every task; one too long for a row costs more than any room.
    self._cumulative = []
    for fit in self._fits:
      clipped = np.minimum(lengths, fit.largest)
      over = (lengths > fit.largest) * (sum(self._room) + 1)
      sides = (np.concatenate([[0], np.cumsum(c[clipped] + over)]) for c in (fit.inputs, fit.targets))
      self._cumulative.append(tuple(sides))

  @functools.lru_cache(maxsize=2)  # noqa: B019 - a planner lives as long as its run
  def plan(self, epoch: int) -> Plan:
    starts, lengths, rows, row_tasks = self._walk(epoch)
    row_task = np.array(row_tasks, np.int8)
    return Plan(
      np.array(starts, np.int64), np.array(lengths, np.int64), np.array(rows, np.int64), row_task,
      self._order(row_task, epoch),
    )  # fmt: skip

  def _order(self, row_task: np.ndarray, epoch: int) -> np.ndarray:
    """Rows shuffled among those of their task: the sequence of tasks, with its exact blocks, stays."""
    order = np.empty(len(row_task), np.int64)
    for task in range(len(self._counts)):
      places = np.flatnonzero(row_task == task)
      order[places] = places[generator(self._seed, ROW_ORDER, epoch, task).random(len(places)).argsort(kind='stable')]
    return order

  def _tasks(self, epoch: int):
    block = 0
    while True:
      yield from block_choices(self._counts, self._seed, TASK_ORDER, epoch, block, 64).ravel().tolist()
      block += 64

  def _walk(self, epoch: int):
    ends = self._offsets
    document, at, total = 0, int(ends[0]), int(ends[-1])
    starts: list[int] = []
    lengths: list[int] = []
    rows, row_tasks = [0], []
    for task in self._tasks(epoch):
      if at == total:
        break
      row_tasks.append(task)
      document, at = self._fill(task, document, at, starts, lengths)
      rows.append(len(starts))
    return starts, lengths, rows, row_tasks

  def _fill(self, task: int, document: int, at: int, starts: list[int], lengths: list[int]) -> tuple[int, int]:
    """Appends one row's pieces from token `at` of `document`; returns where the next row begins."""
    ends, fit = self._offsets, self._fits[task]
    room = list(self._room)

    def take(length: int) -> None:
      starts.append(at)
      lengths.append(length)
      room[0] -= int(fit.inputs[length])
      room[1] -= int(fit.targets[length])

    last = len(ends) - 1
    if at > ends[document]:  # the rest of a document that the row before began
      rest = int(ends[document + 1]) - at
      size = min(rest, int(fit.most[0][room[0]]), int(fit.most[1][room[1]]))
      take(size)
      at += size
      if size < rest:
        return document, at
      document += 1
    whole = self._whole(task, document, room)
    for d in range(document, whole):
      at = int(ends[d])
      take(int(ends[d + 1]) - at)
    document, at = whole, int(ends[min(whole, last)])
    size = min(int(fit.most[0][room[0]]), int(fit.most[1][room[1]]))
    if document < last and size >= min(MIN_PIECE, int(ends[document + 1]) - at) and size > 0:
      take(size)
      at += size
    return document, at

  def _whole(self, task: int, document: int, room: list[int]) -> int:
    """The document before which the room ends, if whole ones are taken from `document` on."""
    inputs, targets = self._cumulative[task]
    by_inputs = np.searchsorted(inputs, inputs[document] + room[0], side='right') - 1
    by_targets = np.searchsorted(targets, targets[document] + room[1], side='right') - 1
    return int(min(by_inputs, by_targets, len(self._offsets) - 1))
