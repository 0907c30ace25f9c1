"""Which row comes when: tasks in blocks of exact rates, rows at random. Each position is computed alone.

An epoch goes through the shards of a store in a random order, a window of them at a time; inside a window any row may
be next, or the next one of a curriculum (curriculum.py). So a run holds the plans of one window, whatever the size
of its store.
"""

from collections.abc import Callable

import numpy as np

from data.bits import orders, permute, stream_key
from data.ragged import starts

WINDOW = 8  # shards

# (number of the window, its shards, task) -> in which order the task's rows of these shards come: int64, a permutation.
Arrange = Callable[[int, np.ndarray, int], np.ndarray]


class Deal:
  """An endless sequence of numbers 0, 1, … at exact rates: every block holds its share of each, in a random order."""

  def __init__(self, block: np.ndarray, seed: int, purpose: str):
    self.block, self._seed, self._purpose = block, seed, purpose
    self.shares = np.bincount(block)
    self._firsts = starts(self.shares)

  def at(self, places: np.ndarray, *counter: int) -> tuple[np.ndarray, np.ndarray]:
    """(number, which of that number's occurrences) at each position of the sequence of `counter`: int64 arrays."""
    size = len(self.block)
    if size == 1:
      return np.full(len(places), self.block[0]), places
    blocks, within = np.divmod(places, size)
    asked, rows = np.unique(blocks, return_inverse=True)
    slots = orders(stream_key(self._seed, self._purpose, *counter, asked), size)[rows, within]
    numbers = self.block[slots]
    return numbers, blocks * self.shares[numbers] + slots - self._firsts[numbers]


class EpochOrder:
  """The order of one epoch. `counts` (int64[shards, tasks]) is how many rows of each task a shard's plan has.

  Rows of a task come at random in a window, or as `arrange` orders them; rows that fill no whole block come last.
  """

  def __init__(
    self,
    counts: np.ndarray,
    deal: Deal,
    *,
    seed: int,
    purpose: str,
    epoch: int,
    window: int = WINDOW,
    arrange: Arrange | None = None,
  ):
    self._counts, self._deal, self._seed, self._purpose, self._epoch = counts, deal, seed, purpose, epoch
    self._arrange = arrange
    order = permute(np.arange(len(counts)), len(counts), stream_key(seed, purpose + ' shards', epoch))
    self._windows = [order[i : i + window] for i in range(0, len(order), window)]
    self._ends = np.cumsum([counts[own].sum() for own in self._windows])

  @property
  def num_rows(self) -> int:
    return int(self._ends[-1])

  def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shard, task, which of the shard's rows of that task) at each position of the epoch: int64 arrays."""
    windows = np.searchsorted(self._ends, places, side='right')
    found = np.empty((3, len(places)), np.int64)
    for number in np.unique(windows).tolist():
      own = windows == number
      first = self._ends[number - 1] if number else 0
      found[:, own] = self._in_window(number, places[own] - first)
    return found[0], found[1], found[2]

  def _in_window(self, number: int, places: np.ndarray) -> np.ndarray:
    shards = self._windows[number]
    counts = self._counts[shards]
    ends = np.cumsum(counts, 0)
    tasks, ranks = self._tasks(number, places, ends[-1])
    rows = self._rows(number, tasks, ranks, ends[-1])
    shard = (rows >= ends[:, tasks]).sum(0)
    return np.stack([shards[shard], tasks, rows - (ends - counts)[shard, tasks]])

  def _rows(self, number: int, tasks: np.ndarray, ranks: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Which of the window's rows of its task each is."""
    if self._arrange is None:
      key = stream_key(self._seed, self._purpose + ' rows', self._epoch, number, tasks)
      return permute(ranks, totals[tasks], key)
    rows = np.empty_like(ranks)
    for task in np.unique(tasks).tolist():
      own = tasks == task
      rows[own] = self._arrange(number, self._windows[number], task)[ranks[own]]
    return rows

  def _tasks(self, number: int, places: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(task, which of the window's rows of that task); rows that fill no whole block come last, in any order."""
    shares = self._deal.shares
    blocks = int((totals // shares).min())
    whole = places < blocks * shares.sum()
    found = np.empty((2, len(places)), np.int64)
    found[:, whole] = self._deal.at(places[whole], self._epoch, number)
    left = totals - blocks * shares
    key = stream_key(self._seed, self._purpose + ' rest', self._epoch, number)
    rest = permute(places[~whole] - blocks * shares.sum(), int(left.sum()), key)
    tasks = np.searchsorted(np.cumsum(left), rest, side='right')
    found[:, ~whole] = tasks, blocks * shares[tasks] + rest - starts(left)[tasks]
    return found[0], found[1]
