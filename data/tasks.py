"""What a row does to its pieces of text, and what that costs in the encoder and the decoder.

An objective is a set of tasks with rates; every row has one task. A task's costs are known from the length of a piece
alone, so rows can be planned before any random number is drawn.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from data.noise import noise_counts

Kind = Literal['causal', 'uniform_prefix', 'last_quarter', 'spans', 'masked', 'pairs']
MAX_BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """`mode` is 0, 1, 2 for [NLU], [NLG], [S2S] in front of the inputs, None for no token. `rate` is relative.

  Of the chosen tokens of a masked task, the share `mask` is hidden and the share `random` replaced (data/masking.py).
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

  def counts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(noise tokens, noise spans) of pieces: int64 arrays. The split of a uniform prefix is drawn later: -1."""
    if self.kind == 'uniform_prefix':
      return np.full_like(lengths, -1), np.ones_like(lengths)
    noise, spans = noise_counts(lengths, self.noise_density, self.mean_noise_span_length)
    return np.where(lengths > 1, noise, 0), spans

  def costs(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets): places that pieces take, with mode token, sentinels and EOS; 0 for an empty piece.

    Exact, but for the split of a uniform prefix, and for spans of one token or with random_roll: upper bounds.
    """
    noise, spans = self.counts(lengths)
    extra = self.mode is not None
    match self.kind:
      case 'causal':
        inputs, targets = np.zeros_like(lengths), lengths
      case 'masked':  # one sequence, read and answered in the same places
        inputs, targets = np.zeros_like(lengths), lengths + 1
      case 'uniform_prefix':
        inputs, targets = lengths + extra, np.maximum(lengths, 2)
      case 'last_quarter':
        inputs, targets = lengths - noise + extra + 1, noise + 1
      case 'spans':
        sentinels = spans + self.random_roll  # rolling may cut one span in two
        inputs, targets = lengths - noise + sentinels + extra + 1, noise + sentinels + 1
      case 'pairs':
        raise ValueError('each side of a pair has a length of its own; data/pairs.py plans them.')
    return np.where(lengths > 0, inputs, 0), np.where(lengths > 0, targets, 0)

  def total_costs(self, lengths: np.ndarray) -> np.ndarray:
    """Places that pieces take in a model of one stack, which reads inputs and targets one after the other."""
    if self.kind == 'uniform_prefix':
      return np.where(lengths > 0, lengths + 2 + (self.mode is not None), 0)
    return sum(self.costs(lengths))


@dataclasses.dataclass(frozen=True)
class Budget:
  """Places in a row. `inputs_length` is 0 for a model of one stack, decoder or encoder."""

  inputs_length: int
  targets_length: int

  @property
  def longest(self) -> int:
    """No piece is longer: each of its tokens stands in the inputs or in the targets."""
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
