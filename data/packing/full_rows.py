"""Full rows: segments of several tasks share a row, so that encoder and decoder are both full.

An example of a task is as much text as fills a row of its own with `inputs_length` positions on either side. Examples
are dealt along the text of a shard in blocks that hold their exact rates, so the tokens of each task are exact in every
block of text. Documents, and the ends of rows, cut examples in pieces; a piece is a segment and keeps its task. Rows
are filled by filling.py. Source of tasks by example: Tay et al. 2022, arXiv:2205.05131, §3.1.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from data.bits import stream_key
from data.objectives.denoise import uniform_prefix
from data.objectives.tasks import Budget, Task, block_of
from data.packing.concat_split import VARIANTS
from data.packing.filling import Queues, Tables, fill
from data.packing.order import Deal
from data.packing.plan import Bins, Pieces, Stream
from data.ragged import spread

ROWS_PER_LANE = 128  # the last row of a lane is half empty on average: 0.4% of its rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullRows:
  """Segments of different tasks share a row (data/packing/full_rows.py). For an encoder-decoder on text."""

  name: Literal['full_rows'] = 'full_rows'


class Examples:
  """One block of examples: `block` (int64, the task of each), the tokens and mean costs of an example of each task."""

  def __init__(self, tasks: tuple[Task, ...], budget: Budget):
    self.block = block_of([task.rate for task in tasks], 'objective rates')
    own = Budget(budget.inputs_length, budget.inputs_length)
    self.lengths = np.array([own.capacity(task) for task in tasks])
    pairs = zip(tasks, self.lengths.tolist(), strict=True)
    self.encoder, self.decoder = np.array([mean_costs(task, length) for task, length in pairs]).T

  @property
  def ratio(self) -> float:
    """Decoder positions for each encoder position."""
    return float(self.decoder[self.block].sum() / self.encoder[self.block].sum())


def mean_costs(task: Task, length: int) -> tuple[float, float]:
  """(encoder, decoder) positions of a piece; the mean over its splits for a uniform prefix."""
  if task.kind == 'uniform_prefix':
    return length / 2 + 1 + (task.mode is not None), length / 2 + 1
  encoder, decoder = task.costs(np.array([length]))
  return float(encoder[0]), float(decoder[0])


def shortest_targets(tasks: tuple[Task, ...], budget: Budget) -> int:
  """The shortest decoder that is not full before the encoder, at the rates of `tasks`."""
  return math.ceil(budget.inputs_length * Examples(tasks, budget).ratio)


def check_full_rows(tasks: tuple[Task, ...], budget: Budget) -> None:
  """Raises ValueError for rows without an encoder, or with a decoder too short for the rates."""
  if not budget.inputs_length:
    raise ValueError(
      "data.packing.name='full_rows' fills an encoder and a decoder, data.inputs_length=0 has no encoder; set "
      "data.packing.name='concat_split'."
    )
  shortest = shortest_targets(tasks, budget)
  if budget.targets_length < shortest:
    raise ValueError(
      f"data.targets_length={budget.targets_length} is too short for data.packing.name='full_rows' at the rates of the "
      f'objective: with data.inputs_length={budget.inputs_length} they need {shortest} decoder positions in a row; set '
      f'data.targets_length >= {shortest}.'
    )


def prefix_bits(seed: int, purpose: str, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """uint64[pieces]: the random number that splits the prefix of a piece, known before its row is planned."""
  return stream_key(seed, purpose + ' prefixes', places, lengths)


class FullRowsPlanner:
  """A planner (data/packing/plan.py); `stream(shard)` are the documents of a shard. Pieces have tasks, rows do not."""

  def __init__(
    self, stream: Callable[[int], Stream], tasks: tuple[Task, ...], budget: Budget, *, seed: int, purpose: str
  ):
    self._stream, self._tasks, self._budget, self._seed, self._purpose = stream, tasks, budget, seed, purpose
    self._examples = Examples(tasks, budget)
    self._deal = Deal(self._examples.block, seed, purpose + ' tasks of examples')
    self._whole = np.array([task.kind == 'uniform_prefix' for task in tasks])  # never cut: its split is drawn
    self.variants = VARIANTS if len(tasks) > 1 or self._whole.any() else 1
    capacity = np.array([budget.capacity(task) for task in tasks])
    self._parts = np.where(self._whole, -(-self._examples.lengths // capacity), 1)
    slopes = self._examples.decoder / self._examples.encoder
    heavy = slopes > self._examples.ratio * (1 + 1e-9)
    self._queue_of = np.where(self._whole, 0, np.where(heavy, 2, 1))
    self._tables = Tables.of(tasks, budget, self._heavy_slope(heavy & ~self._whole))

  def _heavy_slope(self, heavy: np.ndarray) -> float:
    own = self._examples.block[heavy[self._examples.block]]
    return float(self._examples.decoder[own].sum() / self._examples.encoder[own].sum()) if len(own) else math.inf

  def plan(self, shard: int, variant: int) -> Bins:
    stream = self._stream(shard)
    pieces, blocks = self.pieces_of(stream, shard, variant)
    if not len(pieces.lengths):
      return Bins(np.zeros(0, np.int8), np.zeros(1, np.int64), pieces)
    encoder, decoder = self._costs(pieces)
    rows = max(encoder.sum() / self._budget.inputs_length, decoder.sum() / self._budget.targets_length)
    lanes = min(max(int(rows) // ROWS_PER_LANE, 1), int(blocks[-1]) + 1)
    queues = Queues.of(blocks * lanes // (int(blocks[-1]) + 1), self._queue_of[pieces.tasks], lanes)
    of = queues.order
    taken = fill(queues, self._tables, pieces.tasks[of], pieces.lengths[of], encoder[of], decoder[of])
    return _bins(pieces, of[taken.pieces], taken)

  def pieces_of(self, stream: Stream, shard: int, variant: int) -> tuple[Pieces, np.ndarray]:
    """(the pieces of a shard's examples, in order, before rows cut them; the block of examples of each)."""
    size, own = len(self._examples.block), self._examples.lengths
    blocks = -(-stream.size // int(own[self._examples.block].sum()))
    tasks = self._deal.at(np.arange(blocks * size), variant, shard)[0]
    begins = np.cumsum(own[tasks]) - own[tasks]
    parts = self._parts[tasks]
    example, part = np.repeat(np.arange(len(tasks)), parts), spread(np.zeros_like(parts), parts)
    cut = lambda k: np.minimum(begins[example] + own[tasks[example]] * k // parts[example], stream.size)
    first, last = cut(part), cut(part + 1)
    some = first < last  # the last block may end before its last examples
    pieces = stream.pieces(first[some], last[some])
    example = example[some][pieces.rows]
    return Pieces(*pieces[:4], tasks[example].astype(np.int8)), example // size

  def _costs(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """(encoder, decoder) positions of each piece, whole: int64."""
    encoder, decoder = np.zeros((2, len(pieces.lengths)), np.int64)
    for number, task in enumerate(self._tasks):
      own = pieces.tasks == number
      encoder[own], decoder[own] = task.costs(pieces.lengths[own])
    own = self._whole[pieces.tasks]
    lengths = pieces.lengths[own]
    before = uniform_prefix(lengths, prefix_bits(self._seed, self._purpose, pieces.places[own], lengths))
    modes = np.array([task.mode is not None for task in self._tasks])[pieces.tasks[own]]
    encoder[own], decoder[own] = before + 1 + modes, lengths - before + 1
    return encoder, decoder


def _bins(pieces: Pieces, which: np.ndarray, taken) -> Bins:
  """The rows of all lanes, one lane after another; pieces of a row in the order of the text."""
  key = taken.lanes << 40 | taken.rows
  places = pieces.places[which] + taken.begins
  order = np.lexsort((places, key))
  ordered = key[order]
  rows = np.cumsum(np.diff(ordered, prepend=ordered[:1]) != 0)
  which = which[order]
  listed = Pieces(rows, pieces.documents[which], places[order], taken.lengths[order], pieces.tasks[which])
  firsts = np.searchsorted(rows, np.arange(rows[-1] + 2))
  return Bins(np.zeros(len(firsts) - 1, np.int8), firsts, listed)
