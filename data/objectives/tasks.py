"""What a row does to its pieces of text, and what that costs in the encoder and the decoder.

An objective is a set of tasks with rates; every row has one task, or each segment of a row (data/packing/full_rows.py).
A task's costs are known from the length of a piece alone, so rows can be planned before any random number is drawn.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from data.objectives.noise import noise_counts

Kind = Literal[
  'causal', 'uniform_prefix', 'last_quarter', 'spans', 'iid', 'infilling', 'fim', 'masked', 'pairs', 'turns'
]
Hide = Literal['sentinel_per_run', 'mask', 'drop']
LEFT_TO_RIGHT = ('causal', 'fim')  # kinds that have no inputs, and see where documents end
FIM_SENTINELS = 3
MAX_BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """`mode` is 0, 1, 2 for [NLU], [NLG], [S2S] in front of the inputs, None for no token. `rate` is relative.

  `noise_density` is the share of what is hidden: tokens, words (infilling), or pieces that are cut in three (fim, of
  these the share `spm` with the suffix first). Of the chosen tokens of a masked task, the share `mask` is hidden and
  the share `random` replaced (masking.py); of the masks of an iid task too. `full`: the targets are all the text.
  `opened`: the tokenizer has a token that an encoder reads before each text ([CLS]), which a masked task pays for.
  `growth` is the most tokens that a cut inside a token adds (data/objectives/fim.py).
  """

  label: str
  kind: Kind
  rate: float = 1.0
  mode: int | None = None
  noise_density: float = 0.25
  mean_noise_span_length: float = math.inf
  random_roll: bool = False
  mask: float = 0.8
  random: float = 0.1
  hide: Hide = 'sentinel_per_run'
  full: bool = False
  permute: bool = False
  spm: float = 0.0
  growth: int = 0
  opened: bool = False
  loss_on_inputs: bool = False

  @property
  def shows_blanks(self) -> bool:
    """Whether inputs have sentinels where something is hidden."""
    return self.kind in ('spans', 'infilling') or (self.kind == 'iid' and self.hide != 'drop')

  def counts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(noise tokens, noise spans) of pieces: int64 arrays. The split of a uniform prefix is drawn later: -1.

    Of iid noise nothing is known before: no noise, one span.
    """
    if self.kind in ('uniform_prefix', 'iid'):
      return np.full_like(lengths, -1 if self.kind == 'uniform_prefix' else 0), np.ones_like(lengths)
    noise, spans = noise_counts(lengths, self.noise_density, self.mean_noise_span_length)
    return np.where(lengths > 1, noise, 0), spans

  def costs(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets): positions that pieces take, with mode token, [CLS], sentinels and EOS; 0 for an empty piece.

    Exact, but for the split of a uniform prefix, spans of one token or with random_roll, and what depends on the text
    or on chance alone (iid, infilling, fim): upper bounds.
    """
    noise, spans = self.counts(lengths)
    extra = self.mode is not None
    match self.kind:
      case 'causal':
        inputs, targets = np.zeros_like(lengths), lengths
      case 'masked':  # one sequence, read and answered at the same positions
        inputs, targets = np.zeros_like(lengths), lengths + 1 + self.opened
      case 'uniform_prefix':
        inputs, targets = lengths + extra, np.maximum(lengths, 2)
      case 'last_quarter':
        inputs, targets = lengths - noise + extra + 1, noise + 1
      case 'spans':
        sentinels = spans + self.random_roll  # rolling may cut one span in two
        inputs, targets = lengths - noise + sentinels + extra + 1, noise + sentinels + 1
      case 'iid':
        inputs, targets = lengths + 1, self._iid_targets(lengths) + 1
      case 'infilling':
        inputs, targets = lengths + self.most_inserted(lengths) + 1, lengths + 1
      case 'fim':
        inputs, targets = np.zeros_like(lengths), lengths + FIM_SENTINELS + 2 * self.growth
      case 'pairs' | 'turns':
        raise ValueError('each side of a pair, each turn, has a length of its own; data/examples/units.py plans them.')
    return np.where(lengths > 0, inputs, 0), np.where(lengths > 0, targets, 0)

  def most_hidden(self, lengths: np.ndarray) -> np.ndarray:
    """The most tokens that iid noise hides: int64 array.

    Chance alone has no bound. This one is 8 standard deviations from the mean, and is met less than once in a million
    pieces (tests/data/objectives/test_tasks.py); there the last hidden tokens stay in sight.
    """
    r = self.noise_density
    return np.minimum(lengths, _bound(lengths * r, lengths * r * (1 - r)))

  def most_inserted(self, lengths: np.ndarray) -> np.ndarray:
    """The most masks that infilling puts between words: int64 array. Bounded as `most_hidden` is."""
    words, mu = np.ceil(lengths * self.noise_density), self.mean_noise_span_length
    empty = math.exp(-mu)  # the share of spans of no words, of about words / mu + 1
    mean = empty * (words / mu + 1)
    return _bound(mean, mean / (1 - empty))

  def _iid_targets(self, lengths: np.ndarray) -> np.ndarray:
    """The most tokens in the targets of iid noise; a run of hidden tokens, or of others, is as long as its sentinel."""
    if self.full:
      return lengths
    hidden = self.most_hidden(lengths)
    return hidden if self.hide != 'sentinel_per_run' else np.minimum(2 * hidden + 1, lengths)

  def sentinels(self, length: int) -> int:
    """The most sentinels that a piece of at most `length` tokens can take."""
    match self.kind, self.hide:
      case ('spans', _):
        return int(self.counts(np.array([length]))[1][0]) + self.random_roll
      case ('iid', 'sentinel_per_run'):
        return min(int(self.most_hidden(np.array([length]))[0]) + 1, (length + 1) // 2)
      case ('infilling' | 'masked', _) | ('iid', 'mask'):
        return 1
      case _:
        return FIM_SENTINELS if self.kind == 'fim' else 0

  def total_costs(self, lengths: np.ndarray) -> np.ndarray:
    """Places that pieces take in a model of one stack, which reads inputs and targets one after the other."""
    if self.kind == 'uniform_prefix':
      return np.where(lengths > 0, lengths + 2 + (self.mode is not None), 0)
    return sum(self.costs(lengths))


def _bound(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
  return np.ceil(mean + 8 * np.sqrt(variance) + 4).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Budget:
  """Positions of a row. `inputs_length` is 0 for a model of one stack, decoder or encoder."""

  inputs_length: int
  targets_length: int

  @property
  def rooms(self) -> tuple[int, ...]:
    """The positions of each side of a row."""
    return tuple(filter(None, (self.inputs_length, self.targets_length)))

  @property
  def longest(self) -> int:
    """No piece is longer: each of its tokens is in the inputs or in the targets."""
    return self.inputs_length + self.targets_length

  @functools.cached_property
  def _lengths(self) -> np.ndarray:
    return np.arange(self.longest + 2)

  def costs(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(encoder, decoder) costs of pieces of 0 … longest + 1 tokens; a row of one stack has one budget, the second."""
    if self.inputs_length:
      return task.costs(self._lengths)
    return np.zeros_like(self._lengths), task.total_costs(self._lengths)

  def capacity(self, task: Task) -> int:
    """The longest piece that fits an empty row; 0 where none does."""
    encoder, decoder = self.costs(task)
    fits = (encoder <= self.inputs_length) & (decoder <= self.targets_length)
    return int(np.flatnonzero(fits)[-1])


def block_of(rates: Sequence[float], what: str) -> np.ndarray:
  """The shortest block in which every rate is exact: int64[block], how often each index stands in it in turn.

  Raises ValueError for a rate that is not positive, or where the block would be longer than 4096.

  >>> block_of([0.5, 0.25, 0.25], 'rates').tolist()
  [0, 0, 1, 2]
  """
  if not rates or min(rates) <= 0:
    raise ValueError(f'{what}={list(rates)}; every one must be greater than 0.')
  parts = [Fraction(rate).limit_denominator(10_000) for rate in rates]
  shares = [part / sum(parts) for part in parts]
  size = math.lcm(*(share.denominator for share in shares))
  if size > MAX_BLOCK or min(parts) == 0:
    raise ValueError(f'{what}={list(rates)} are exact only in blocks of {size} rows; use rounder numbers.')
  return np.repeat(np.arange(len(rates)), [int(share * size) for share in shares])
