"""Which source each row of a run comes from: exact shares in every block of rows, stage after stage.

The source and row at a position depend only on the stages up to it. When its share changes, a source continues with its
next row, so its epochs are complete in spite of stages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.objectives.tasks import MAX_BLOCK, block_of
from data.packing.order import Deal


class Stage(NamedTuple):
  """From row `start` of the run on, the sources have these relative weights; 0 leaves one out."""

  start: int
  weights: tuple[float, ...]


class Mixture:
  """The stages of a run, in order. The first one begins at row 0, or at the row at which the run's sources or weights
  changed; `used` is the number of rows of each source before that row."""

  def __init__(self, stages: Sequence[Stage], seed: int, used: Sequence[int] | np.ndarray | None = None):
    self.stages, self._seed = tuple(stages), seed
    self._deals = [Deal(quotas(stage.weights), seed, 'mixture') for stage in stages]
    self._starts = np.array([stage.start for stage in stages])
    self._used = np.zeros((len(stages), len(stages[0].weights)), np.int64)  # rows of each source before each stage
    self._used[0] = 0 if used is None else used
    for number in range(1, len(stages)):
      self._used[number] = self._used_in(number - 1, stages[number].start)

  def restarted(
    self, start: int, used: Sequence[int], weights: Sequence[float] | None = None, shift: int = 0
  ) -> 'Mixture':
    """The mixture of a run that has used `used` rows of each source before row `start`: these stages from there on.

    If `weights` are given, they hold for the rest of the run instead. `shift` is added to the stages' starts, because
    earlier steps had batches of another size.
    """
    if weights is not None:
      return Mixture([Stage(start, tuple(weights))], self._seed, used)
    now = self.stages[max(self._number(start - shift), 0)]
    later = [stage._replace(start=stage.start + shift) for stage in self.stages if stage.start + shift > start]
    return Mixture([now._replace(start=start), *later], self._seed, used)

  def at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, row number within that source) of `count` rows of the run from `start` on: int64 arrays."""
    first, last = self._number(start), self._number(start + count - 1)
    parts = []
    for number in range(first, last + 1):
      begin = max(start, self._starts[number])
      end = min(start + count, self._starts[number + 1] if number < last else start + count)
      parts.append(self._in_stage(number, int(begin), int(end)))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

  def used(self, position: int) -> np.ndarray:
    """int64[sources]: the number of rows of each source before this position."""
    return self._used_in(self._number(position), position)

  def shares(self, position: int) -> np.ndarray:
    """float64[sources]: each source's share of the rows from the start of the current stage to this position."""
    number = self._number(max(position - 1, 0))
    own = self._used_in(number, position) - self._used[number]
    return own / max(own.sum(), 1)

  def weights(self, position: int) -> np.ndarray:
    """float64[sources], summing to 1: the weights in the stage of the row before this position."""
    weights = np.array(self.stages[self._number(max(position - 1, 0))].weights)
    return weights / weights.sum()

  def _number(self, position: int) -> int:
    return int(np.searchsorted(self._starts, position, side='right')) - 1

  def _used_in(self, number: int, position: int) -> np.ndarray:
    deal, shares = self._deals[number], self._shares(number)
    blocks, rest = divmod(position - int(self._starts[number]), len(deal.block))
    begun = deal.at(blocks * len(deal.block) + np.arange(rest), int(self._starts[number]))[0]
    return self._used[number] + blocks * shares + np.bincount(begun, minlength=len(shares))

  def _in_stage(self, number: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """`at` for rows begin … end - 1, all in one stage. Rows of a source are numbered by counting in whole blocks."""
    deal, shares, origin = self._deals[number], self._shares(number), int(self._starts[number])
    size = len(deal.block)
    first, last = (begin - origin) // size, (end - 1 - origin) // size
    sources = deal.at(np.arange(first * size, (last + 1) * size), origin)[0]
    which = np.empty(len(sources), np.int64)
    for source in np.flatnonzero(shares):
      mine = sources == source
      which[mine] = self._used[number][source] + first * shares[source] + np.arange(mine.sum())
    own = slice(begin - origin - first * size, end - origin - first * size)
    return sources[own], which[own]

  def _shares(self, number: int) -> np.ndarray:
    return np.bincount(self._deals[number].block, minlength=self._used.shape[1])


def quotas(weights: Sequence[float]) -> np.ndarray:
  """int64[block]: each source in proportion to its weight; 0 leaves it out. Raises ValueError for invalid weights.

  Exact if a block of at most 4096 rows can be exact; otherwise a block of 4096, off by less than one row (0.02%).

  >>> np.bincount(quotas([0.7, 0.2, 0.1])).tolist(), np.bincount(quotas([2 / 3 + 1e-7, 1 / 3])).tolist()
  ([7, 2, 1], [2, 1])
  """
  if min(weights) < 0 or not sum(weights):
    raise ValueError(f'weights={list(weights)}; none may be negative, and at least one must be greater than 0.')
  present = [i for i, weight in enumerate(weights) if weight]
  try:
    return np.array(present)[block_of([weights[i] / sum(weights) for i in present], 'weights')]
  except ValueError:  # only a longer block would be exact
    exact = np.array(weights) / sum(weights) * MAX_BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind='stable')[: MAX_BLOCK - counts.sum()]] += 1
    return np.repeat(np.arange(len(weights)), counts)


def check_seen(weights: Sequence[float], what: str) -> None:
  """Raises ValueError if a source with a positive weight would get no rows because its share is too small."""
  counts = np.bincount(quotas(weights), minlength=len(weights))
  never = [i for i, weight in enumerate(weights) if weight and not counts[i]]
  if never:
    raise ValueError(
      f'{what} {list(weights)} give source {never[0]} less than one row in {MAX_BLOCK}: it would never be used. '
      'Increase its weight, or remove it.'
    )


def by_size(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
  """Weights times size ** (1 / temperature), normalised. A temperature of 1 samples in proportion to size; a higher one
  samples small sources more often.

  Source: Raffel et al. 2020, arXiv:1910.10683, §3.5.2 (temperature-scaled mixing).
  """
  scaled = [weight * size ** (1 / temperature) for weight, size in zip(weights, sizes, strict=True)]
  return [value / sum(scaled) for value in scaled]
