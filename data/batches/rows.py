"""The rows of one store, epoch after epoch: combines plan, order, tokens, random bits and objective."""

import collections
import functools
import threading
from typing import NamedTuple

import numpy as np

from data.bits import draws
from data.examples.make import RowSpec
from data.examples.makers import makers_of
from data.examples.pairs import PairStream, sample_pairs
from data.examples.units import Losses
from data.mixing.curriculum import Curriculum, Order, Random, arrange, row_scores
from data.objectives.features import Batch
from data.objectives.tasks import block_of
from data.packing.full_rows import FullRows
from data.packing.kept_plans import KeptPlans, PlanFiles
from data.packing.order import WINDOW, Deal, EpochOrder
from data.packing.packing import Packing
from data.packing.plan import Pieces, Plan, cut_out, joined, runs_of
from data.ragged import Ragged, join, spread, starts

RANDOM = Random()
GAP = 64  # two pieces of a row with at most so many tokens between them are read in one range


class _Shard(NamedTuple):
  """A plan, its rows grouped by task (int64[rows], in the order of the plan), and the number of rows of each task."""

  plan: Plan
  by_task: np.ndarray
  counts: np.ndarray

  @classmethod
  def of(cls, plan: Plan, num_tasks: int) -> '_Shard':
    return cls(plan, np.argsort(plan.tasks, kind='stable'), np.bincount(plan.tasks, minlength=num_tasks))


class StoreRows:
  """Row k of an endless sequence over one store: epoch 0 in its order, then epoch 1, … Picklable.

  Threads may share one; while a plan is made, other threads wait. The plans of two windows of shards are cached, and
  the row counts of all plans made so far.
  """

  def __init__(
    self,
    store,
    spec: RowSpec,
    packing: Packing,
    *,
    seed: int,
    purpose: str,
    plans: PlanFiles | None = None,
    order: Order = RANDOM,
  ):
    self.store, self._seed, self._purpose = store, seed, purpose
    self._order_cfg = order
    if isinstance(order, Curriculum):
      store.check_score(order.score)
    self._tasks, self._mixed = spec.tasks, isinstance(packing, FullRows)
    rates = [1.0] if self._mixed else [task.rate for task in self._tasks]
    self._num_kinds = len(rates)  # of rows: one of each task, or rows of all tasks
    self._deal = Deal(block_of(rates, 'objective rates'), seed, purpose + ' tasks')
    self._planner, self._maker, self._units = makers_of(store, spec, packing, seed=seed, purpose=purpose, plans=plans)
    self._counts: dict[int, np.ndarray] = {}  # variant -> number of rows: int64[shards, tasks]
    self._plans: collections.OrderedDict[tuple[int, int], _Shard] = collections.OrderedDict()
    self._orders: collections.OrderedDict[int, EpochOrder] = collections.OrderedDict()
    self._arranged: collections.OrderedDict[tuple[int, int], list[np.ndarray]] = collections.OrderedDict()
    self._lock = threading.RLock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._lock = threading.RLock()

  def _plan(self, shard: int, variant: int) -> '_Shard':
    with self._lock:
      if (shard, variant) not in self._plans:
        self._plans[shard, variant] = _Shard.of(self._planner.plan(shard, variant), self._num_kinds)
      self._plans.move_to_end((shard, variant))
      while len(self._plans) > 2 * WINDOW:
        self._plans.popitem(last=False)
      return self._plans[shard, variant]

  def _counts_of(self, variant: int) -> np.ndarray:
    with self._lock:
      if variant not in self._counts:
        count = functools.partial(self._count, variant)
        kept = self._planner.counts(variant, count) if isinstance(self._planner, KeptPlans) else count()
        self._counts[variant] = kept
      return self._counts[variant]

  def _count(self, variant: int) -> np.ndarray:
    shards = range(len(self.store.shards))
    return np.array([self._plan(shard, variant).counts for shard in shards])

  @property
  def variants(self) -> int:
    """The number of different plans of a shard: epoch e uses plan e % variants."""
    return self._planner.variants

  def keep_plan(self, shard: int, variant: int) -> None:
    """Makes a plan, unless a file of it exists already; it is then kept wherever plans are kept."""
    self._planner.plan(shard, variant)
    if isinstance(self._planner, KeptPlans):
      self._planner.share(shard, variant)

  def _order(self, epoch: int) -> EpochOrder:
    with self._lock:
      if epoch not in self._orders:
        counts = self._counts_of(epoch % self._planner.variants)
        cfg = self._order_cfg
        ordered = functools.partial(self._in_order, cfg, epoch) if isinstance(cfg, Curriculum) else None
        self._orders[epoch] = EpochOrder(
          counts, self._deal, seed=self._seed, purpose=self._purpose, epoch=epoch, arrange=ordered
        )
        while len(self._orders) > 2:
          self._orders.popitem(last=False)
      return self._orders[epoch]

  def _in_order(self, cfg: Curriculum, epoch: int, window: int, shards: np.ndarray, task: int) -> np.ndarray:
    """The rows of a task in a window of shards, in the curriculum's order; the orders of two windows are cached."""
    with self._lock:
      if (epoch, window) not in self._arranged:
        self._arranged[epoch, window] = self._arrange(cfg, epoch, window, shards)
        while len(self._arranged) > 2:
          self._arranged.popitem(last=False)
      return self._arranged[epoch, window][task]

  def _arrange(self, cfg: Curriculum, epoch: int, window: int, shards: np.ndarray) -> list[np.ndarray]:
    scores: list[list[np.ndarray]] = [[] for _ in range(self._num_kinds)]
    for shard in shards.tolist():
      planned = self._plan(shard, epoch % self._planner.variants)
      own = self.store.scores(cfg.score, shard)
      by_row = row_scores(planned.plan, own, self.store.shards[shard].documents.start)
      for part, rows in zip(scores, np.split(planned.by_task, np.cumsum(planned.counts)[:-1]), strict=True):
        part.append(by_row[rows])
    purpose = self._purpose + ' curriculum'
    parts = enumerate(np.concatenate(own) for own in scores)
    return [arrange(cfg, part, self._seed, purpose, epoch, window, task) for task, part in parts]

  def num_rows(self, epoch: int) -> int:
    return int(self._counts_of(epoch % self._planner.variants).sum())

  def epoch_of(self, row: int) -> tuple[int, int]:
    """(epoch, first row of that epoch) for a row of the sequence. Plans at most `variants` epochs, for any row."""
    first = 0
    for epoch in range(self._planner.variants):
      end = first + self.num_rows(epoch)
      if row < end:
        return epoch, first
      first = end
    cycles, rest = divmod(row, first)
    epoch, start = self.epoch_of(rest)
    return cycles * self._planner.variants + epoch, cycles * first + start

  def epochs_in(self, count: int) -> float:
    """The number of epochs (with a fraction) in the first `count` rows of the sequence."""
    epoch, first = self.epoch_of(count)
    return epoch + (count - first) / self.num_rows(epoch)

  def epochs(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(epoch, positions in the epoch) for ascending rows of the sequence."""
    groups = []
    while len(rows):
      epoch, first = self.epoch_of(int(rows[0]))
      count = int(np.searchsorted(rows, first + self.num_rows(epoch)))
      groups.append((epoch, rows[:count] - first))
      rows = rows[count:]
    return groups

  def locate(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shard, row of the shard's plan, task) at each of these positions of an epoch."""
    shards, tasks, ranks = self._order(epoch).locate(places)
    rows = np.empty_like(ranks)
    for shard in np.unique(shards).tolist():
      own, planned = shards == shard, self._plan(shard, epoch % self._planner.variants)
      rows[own] = planned.by_task[starts(planned.counts)[tasks[own]] + ranks[own]]
    return shards, rows, tasks

  def pieces(self, epoch: int, shards: np.ndarray, rows: np.ndarray) -> Pieces:
    """The pieces of these rows of an epoch's plans."""
    parts = []
    for shard in np.unique(shards).tolist():
      own = np.flatnonzero(shards == shard)
      parts.append((own, self._plan(shard, epoch % self._planner.variants).plan.pieces(rows[own])))
    return joined(parts)

  def planned(self, shard: int, epoch: int) -> tuple[int, Pieces]:
    """(rows, pieces) of the plan that an epoch uses for a shard."""
    plan = self._plan(shard, epoch % self._planner.variants).plan
    return len(plan.tasks), plan.pieces(np.arange(len(plan.tasks)))

  @property
  def losses(self) -> Losses | None:
    """How many pairs or conversations are cut or left out because rows are too short; None if the store has text."""
    return self._units and self._units.losses

  def sample_pairs(self, count: int) -> list[tuple[list[int], list[int]]]:
    """See `pairs.sample_pairs`; [] if the store has no pairs."""
    units = self._units
    return sample_pairs(self.store, units.losses.longest, count) if isinstance(units, PairStream) else []

  def labels(self, task: int, pieces: Pieces) -> tuple[str, tuple[str, ...] | None]:
    """(the task of a row, or its tasks joined by +; the task of each of its pieces, None if all have the row's)."""
    if pieces.tasks is None:
      return self._tasks[task].label, None
    own = tuple(self._tasks[number].label for number in pieces.tasks.tolist())
    return ' + '.join(dict.fromkeys(own)), own

  def parts(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray | None]:
    """(the segment of each piece of a row, counted from 1; the number of its tokens that carry loss, None if the
    objective decides that)."""
    asked = self._maker.asked(pieces)
    counts = None if asked is None else np.add.reduceat(asked, starts(pieces.lengths), dtype=np.int64)
    return self._maker.segments(pieces), counts

  def batch(self, epoch: int, places: np.ndarray) -> Batch:
    """The fields of the rows at these positions of an epoch."""
    shards, rows, tasks = self.locate(epoch, places)
    pieces = self.pieces(epoch, shards, rows)
    bits = lambda: self._bits(epoch, shards, rows, pieces)
    return self._maker.make(self._tokens(pieces), pieces, tasks, bits)

  def scored_text(self, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens, their places in the store) that carry loss in the first `count` rows of epoch 0; None unless all rows
    are text read from left to right."""
    if self._units or any(task.kind != 'causal' for task in self._tasks):
      return None
    shards, rows, _ = self.locate(0, np.arange(min(count, self.num_rows(0))))
    pieces = self.pieces(0, shards, rows)
    tokens, places = self._tokens(pieces).values, spread(pieces.places, pieces.lengths)
    asked = self._maker.asked(pieces)
    return (tokens, places) if asked is None else (tokens[asked], places[asked])

  def _tokens(self, pieces: Pieces) -> Ragged:
    ranges, places = runs_of(pieces, GAP)
    return cut_out(join(self.store.read(ranges)).values, places, pieces.lengths)

  def _bits(self, epoch: int, shards: np.ndarray, rows: np.ndarray, pieces: Pieces) -> np.ndarray:
    """Random numbers from a stream of its own for each row: one per token and one per piece."""
    counts = np.bincount(pieces.rows, pieces.lengths + 1, len(rows)).astype(np.int64)
    counters = [(epoch, shard, row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
    return draws(self._seed, self._purpose + ' noise', counters, counts.tolist())
