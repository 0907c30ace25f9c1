"""The rows of one store, epoch after epoch: plan, tokens, random bits and objective put together."""

import collections
import threading

import numpy as np

from data.bits import philox
from data.features import Batch
from data.make import RowMaker, RowSpec, text_of
from data.objectives import Supervised, pair_lengths, tasks_of
from data.pairs import PairCounts, PairMaker, PairPlanner, PairStream, sample_pairs
from data.plan import Pieces, Plan, Planner
from data.ragged import Ragged, join, spread, starts


class StoreRows:
  """Row k of an endless sequence over one store: epoch 0 in its order, then epoch 1, … Picklable.

  Threads may share one; a plan is made once, and those who want another meanwhile wait.
  """

  def __init__(self, store, spec: RowSpec, *, seed: int, purpose: str):
    self.store, self._seed, self._purpose = store, seed, purpose
    self._tasks = tasks_of(spec.objective)
    self._pairs: PairStream | None = None
    if isinstance(spec.objective, Supervised):
      self._pairs = PairStream(store, pair_lengths(spec.objective, spec.budget))
      self._maker, self._planner = PairMaker(spec.budget), PairPlanner(self._pairs, spec.budget, seed, purpose)
    else:
      self._maker = RowMaker(spec)
      self._planner = Planner(
        text_of(store, spec), self._tasks, spec.budget, seed=seed, purpose=purpose,
        attend_across_documents=spec.attend_across_documents,
      )  # fmt: skip
    self._firsts = [0]  # the row in the sequence with which each epoch begins
    self._recent: collections.OrderedDict[int, Plan] = collections.OrderedDict()
    self._lock = threading.RLock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._lock = threading.RLock()

  def plan(self, epoch: int) -> Plan:
    """The plan of an epoch; the last two are kept."""
    with self._lock:
      if epoch not in self._recent:
        self._recent[epoch] = self._planner.plan(epoch)
        while len(self._recent) > 2:
          self._recent.popitem(last=False)
      return self._recent[epoch]

  def row_count(self, epoch: int) -> int:
    with self._lock:
      return int(np.diff(self._first_rows(epoch))[epoch])

  def _first_rows(self, epoch: int) -> list[int]:
    """Where epochs 0 … epoch + 1 begin. Counting rows takes planning each epoch once, in order; under the lock."""
    while len(self._firsts) < epoch + 2:
      self._firsts.append(self._firsts[-1] + self.plan(len(self._firsts) - 1).num_rows)
    return self._firsts

  def epochs(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(epoch, rows of its plan) for ascending rows of the sequence, in the order of training."""
    with self._lock:
      while self._firsts[-1] <= rows[-1]:
        self._first_rows(len(self._firsts) - 1)
      epochs = np.searchsorted(self._firsts, rows, side='right') - 1
      groups = []
      for epoch in np.unique(epochs).tolist():
        groups.append((epoch, self.plan(epoch).order[rows[epochs == epoch] - self._firsts[epoch]]))
      return groups

  def pieces(self, epoch: int, rows: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """(pieces of rows of the plan of an epoch, each row's task)."""
    plan = self.plan(epoch)
    return self._planner.stream.pieces(plan.cuts[rows], plan.cuts[rows + 1]), plan.tasks[rows]

  @property
  def pair_counts(self) -> PairCounts | None:
    """None where the store holds text."""
    return self._pairs and self._pairs.counts

  def sample_pairs(self, count: int) -> list[tuple[list[int], list[int]]]:
    """See `pairs.sample_pairs`; none where the store holds text."""
    return sample_pairs(self.store, self._pairs.counts.longest, count) if self._pairs else []

  def task_label(self, task: int) -> str:
    return self._tasks[task].label

  def batch(self, epoch: int, rows: np.ndarray) -> Batch:
    """The fields of rows of an epoch's plan, in the given order."""
    pieces, tasks = self.pieces(epoch, rows)
    return self._maker.make(self._tokens(pieces), pieces.stretches, tasks, lambda: self._bits(epoch, rows, pieces))

  def _tokens(self, pieces: Pieces) -> Ragged:
    """The text of pieces, one read for each row: its pieces lie close together."""
    begin = np.flatnonzero(np.diff(pieces.stretches, prepend=-1))
    end = np.append(begin[1:], len(pieces.stretches)) - 1
    first, last = pieces.places[begin], pieces.places[end] + pieces.lengths[end]
    read = join(self.store.read(list(zip(first.tolist(), (last - first).tolist(), strict=True))))
    if len(read.values) == pieces.lengths.sum():  # no EOS between documents is left out
      return Ragged(read.values, pieces.lengths)
    offset = np.repeat(starts(read.lengths) - first, np.diff(begin, append=len(pieces.stretches)))
    return Ragged(read.values[spread(pieces.places + offset, pieces.lengths)], pieces.lengths)

  def _bits(self, epoch: int, rows: np.ndarray, pieces: Pieces) -> np.ndarray:
    """For each row its own stream: a number for each token and each piece."""
    counts = np.bincount(pieces.stretches, pieces.lengths + 1, len(rows)).astype(np.int64).tolist()
    purpose = self._purpose + ' noise'
    draw = lambda row, count: philox(self._seed, purpose, epoch, row).random_raw(count)
    return np.concatenate([draw(row, count) for row, count in zip(rows.tolist(), counts, strict=True)])
