"""Fills rows on two sides at once, from queues of pieces that take more of one side or of the other.

Lanes are stretches of a shard that are filled side by side, one piece each at a time: every operation works on all
lanes. A row of a lane takes prefixes (never cut), then pieces that need little decoder until the room that is left has
the proportions of pieces that need much, then such pieces. The rest of a cut piece comes first in the lane's next row.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from data.objectives.tasks import Budget, Task

STUB = 8  # tokens; no part of a cut piece is shorter, unless rows hold hardly more
PREFIX, LIGHT, HEAVY = range(3)  # queues
CLOSE = 4  # stages: PREFIX, LIGHT in proportion, HEAVY, LIGHT in any proportion, CLOSE
QUEUE_OF_STAGE = np.array([PREFIX, LIGHT, HEAVY, LIGHT, LIGHT])


class Taken(NamedTuple):
  """int64 arrays over the segments of all rows: the piece, its part, and the row of the lane that holds it."""

  lanes: np.ndarray
  rows: np.ndarray
  pieces: np.ndarray
  begins: np.ndarray
  lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class Queues:
  """Pieces in the order of queues: queue q of lane k is `order` from heads[q, k] to ends[q, k]."""

  order: np.ndarray
  heads: np.ndarray
  ends: np.ndarray

  @classmethod
  def of(cls, lanes: np.ndarray, queues: np.ndarray, number: int) -> 'Queues':
    key = lanes * 3 + queues
    counts = np.bincount(key, minlength=3 * number)
    ends = np.cumsum(counts).reshape(number, 3).T
    return cls(np.argsort(key, kind='stable'), ends - counts.reshape(number, 3).T, ends)


@dataclasses.dataclass(frozen=True)
class Tables:
  """For each task: costs by length, the longest beginning of a piece that fits a room, and that keeps a balance."""

  rooms: tuple[int, int]
  heavy_slope: float
  encoder: np.ndarray
  decoder: np.ndarray
  fits_encoder: np.ndarray
  fits_decoder: np.ndarray
  balance: np.ndarray

  @property
  def stub(self) -> int:
    """The shortest part of a cut piece: every row has room for two."""
    most = np.minimum(self.fits_encoder[:, -1], self.fits_decoder[:, -1]).min()
    return max(min(STUB, int(most) // 2), 1)

  @classmethod
  def of(cls, tasks: tuple[Task, ...], budget: Budget, heavy_slope: float) -> 'Tables':
    """`heavy_slope`: decoder positions for each encoder position of the pieces that come last; inf without any."""
    encoder, decoder = (np.stack(own) for own in zip(*(budget.costs(task) for task in tasks), strict=True))
    rooms = budget.inputs_length, budget.targets_length
    if math.isinf(heavy_slope):
      balance = np.full((len(tasks), 2), budget.longest)
      balance[:, 0] = 0
    else:
      most = math.ceil(heavy_slope * budget.inputs_length) + 1
      balance = _longest(heavy_slope * encoder - decoder, most)
      balance = np.concatenate([np.zeros((len(tasks), 1), np.int64), balance], 1)
    fits = (_longest(cost, room) for cost, room in zip((encoder, decoder), rooms, strict=True))
    return cls(rooms, heavy_slope, encoder, decoder, *fits, balance)

  def within(self, tasks: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The longest beginnings that leave no less than the heavy proportions; `bound` may be negative."""
    last = self.balance.shape[1] - 1
    return self.balance[tasks, (np.floor(np.minimum(bound, last)).astype(np.int64) + 1).clip(0, last)]


def _longest(costs: np.ndarray, room: int) -> np.ndarray:
  """int64[tasks, room + 1]: the longest length whose cost, and that of all shorter ones, is at most 0, 1, … room."""
  found = [np.searchsorted(np.maximum.accumulate(own), np.arange(room + 1), side='right') - 1 for own in costs]
  return np.stack(found).clip(0)


def fill(
  queues: Queues, tables: Tables, tasks: np.ndarray, lengths: np.ndarray, encoder: np.ndarray, decoder: np.ndarray
) -> Taken:
  """The rows of all lanes; the arrays are over pieces in the order of queues, with their costs as a whole."""
  lanes, found = _Lanes(queues, tables, (tasks, lengths, encoder, decoder)), []
  while len(lanes.number):
    found.append(lanes.step())
  return Taken(*(np.concatenate(own) for own in zip(*found, strict=True)))


class _Lanes:
  """The state of the lanes that are not at their end; arrays over them."""

  def __init__(self, queues: Queues, tables: Tables, pieces: tuple[np.ndarray, ...]):
    self._tables, self._stub = tables, tables.stub
    self._tasks, self._lengths, self._encoder, self._decoder = pieces
    self.number = np.arange(queues.heads.shape[1])
    self.head, self.end, self.first = queues.heads.copy(), queues.ends.copy(), queues.heads.copy()
    self.used = np.zeros_like(self.head)
    sums = (np.concatenate([[0], np.cumsum(cost)]) for cost in (self._encoder, self._decoder))
    self.left = np.stack([(own[self.end] - own[self.head]).sum(0) for own in sums]).astype(np.float64)
    self.total = self.left[0].copy()
    self.row, self.stage = np.zeros((2, len(self.number)), np.int64)
    self.room, self.target = np.zeros((2, len(self.number)), np.int64), np.zeros((2, len(self.number)))
    self._open(np.ones(len(self.number), bool))
    self._keep((self.head < self.end).any(0))

  def _keep(self, own: np.ndarray) -> None:
    if own.all():
      return
    for name, values in vars(self).items():
      if not name.startswith('_'):
        setattr(self, name, values[..., own])

  def _open(self, own: np.ndarray) -> None:
    """Begins a row in these lanes. Its target has the proportions of all that is left in the lane."""
    encoder, decoder = self._tables.rooms
    ratio = np.maximum(self.left[1], 1e-3) / np.maximum(self.left[0], 1e-3)
    self.room[:, own] = [[encoder], [decoder]]
    target = np.stack([np.minimum(encoder, decoder / ratio), np.minimum(decoder, encoder * ratio)])
    self.target = np.where(own, target, self.target)
    self.stage[own] = 0

  def step(self) -> Taken:
    """One segment for each lane, or the end of its row."""
    wanted = self._choose()
    lanes = np.flatnonzero(self.stage < CLOSE)
    stage, length = self.stage[lanes], wanted[self.stage[lanes], lanes]
    queue = QUEUE_OF_STAGE[stage]
    piece, begin = self.head[queue, lanes], self.used[queue, lanes]
    taken = Taken(self.number[lanes], self.row[lanes], piece, begin, length)
    cut = begin + length < self._lengths[piece]
    self._take(taken, lanes, queue, cut)
    self.stage[lanes[cut & (stage == LIGHT)]] = HEAVY
    closed = self.stage == CLOSE
    closed[lanes[cut & (stage > LIGHT)]] = True
    self.row += closed
    self._open(closed)
    self._keep((self.head < self.end).any(0))
    return taken

  def _take(self, taken: Taken, lanes: np.ndarray, queue: np.ndarray, cut: np.ndarray) -> None:
    piece, own = taken.pieces, queue == PREFIX
    tasks, tables = self._tasks[piece], self._tables
    length = np.where(own, 0, taken.lengths)
    cost = np.stack([tables.encoder[tasks, length], tables.decoder[tasks, length]])
    whole = np.stack([self._encoder[piece], self._decoder[piece]])
    cost = np.where(own, whole, cost)
    self.room[:, lanes] -= cost
    self.target[:, lanes] -= cost
    self.left[:, lanes] -= whole * (taken.lengths / self._lengths[piece])
    self.used[queue, lanes] = np.where(cut, taken.begins + taken.lengths, 0)
    self.head[queue, lanes] += ~cut

  def _choose(self) -> np.ndarray:
    """int64[stages, lanes]: how much each stage would take of its queue's head; moves `stage` on to one that can."""
    some = self.head < self.end
    heads = np.minimum(self.head, len(self._tasks) - 1)
    tasks, left = self._tasks[heads], self._lengths[heads] - self.used
    fits = np.minimum(self._tables.fits_encoder[tasks, self.room[0]], self._tables.fits_decoder[tasks, self.room[1]])
    slope = self._tables.heavy_slope
    bound = self.room[0] if math.isinf(slope) else slope * self.target[0] - self.target[1]
    even = np.minimum(fits[LIGHT], self._tables.within(tasks[LIGHT], bound))
    wanted = np.stack([left[PREFIX], even, fits[HEAVY], fits[LIGHT]])
    queue = QUEUE_OF_STAGE[:CLOSE]
    whole = wanted >= left[queue]
    wanted = np.where(whole, left[queue], np.minimum(wanted, left[queue] - self._stub))
    can = some[queue] & (whole | (wanted >= self._stub))
    can[PREFIX] &= self._prefix_due(some, heads[PREFIX])
    for stage in range(CLOSE):
      self.stage += (self.stage == stage) & ~can[stage]
    return wanted

  def _prefix_due(self, some: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """Whether the next prefix fits, and prefixes have fallen behind the rest of the lane, or nothing else is left."""
    fits = (self._encoder[piece] <= self.room[0]) & (self._decoder[piece] <= self.room[1])
    number = np.maximum(self.end[PREFIX] - self.first[PREFIX], 1)
    place = (self.head[PREFIX] - self.first[PREFIX] + 0.5) / number
    return fits & ((place <= 1 - self.left[0] / self.total) | ~(some[LIGHT] | some[HEAVY]))
