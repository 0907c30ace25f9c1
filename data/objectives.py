"""Objectives: configs, and tasks. A task turns a piece of one document into (inputs, targets), and knows their lengths."""

import dataclasses
from collections.abc import Callable
from typing import Literal, assert_never

import numpy as np
from jaxtyping import Int

from data.noise import (
  noise_counts,
  noise_span_to_unique_sentinel,
  nonnoise_span_to_unique_sentinel,
  random_spans_noise_mask,
)
from data.vocabulary import EOS, Vocabulary

Ids = Int[np.ndarray, ' length']
MODE_OF_KIND = {'R': '[NLU]', 'X': '[NLG]', 'S': '[S2S]'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLm:
  """Every token is predicted from those before it in its document."""

  name: Literal['causal_lm'] = 'causal_lm'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLm:
  """A prefix of uniform length is given, the rest predicted. Source: Raffel et al. 2020, §3.2.1; preprocessors.prefix_lm."""

  name: Literal['prefix_lm'] = 'prefix_lm'


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
  """T5's objective. Source: Raffel et al. 2020, §3.1.4; preprocessors.span_corruption."""

  name: Literal['span_corruption'] = 'span_corruption'
  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  random_roll: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
  """R (regular), X (extreme): span corruption at these settings; S (sequential): a prefix. `rate` is a share of rows."""

  kind: Literal['R', 'X', 'S']
  mean_noise_span_length: float | None = None
  noise_density: float | None = None
  rate: float = 1.0


def _denoiser(kind, mean=None, density=None, rate=1.0) -> Denoiser:
  return Denoiser(kind=kind, mean_noise_span_length=mean, noise_density=density, rate=rate)


# Tay et al. 2022, arXiv:2205.05131, Table 1; equal rates, as its appendix' code samples them.
UL2_DENOISERS = (
  _denoiser('R', 3.0, 0.15), _denoiser('R', 8.0, 0.15), _denoiser('X', 3.0, 0.5), _denoiser('X', 8.0, 0.5),
  _denoiser('X', 64.0, 0.15), _denoiser('X', 64.0, 0.5), _denoiser('S'),
)  # fmt: skip
# Tay et al. 2022, arXiv:2210.11399, §2.2-2.4: half S, a quarter R, a quarter X.
UL2R_DENOISERS = (
  _denoiser('S', rate=0.5), _denoiser('R', 3.0, 0.15, 0.25), _denoiser('X', 32.0, 0.15, 0.125),
  _denoiser('X', 3.0, 0.5, 0.125),
)  # fmt: skip
PrefixMode = Literal['uniform_prefix', 'last_quarter']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ul2:
  """A mixture of denoisers, each announced by its mode token. Source: Tay et al. 2022, arXiv:2205.05131, §3."""

  name: Literal['ul2'] = 'ul2'
  denoisers: tuple[Denoiser, ...] = UL2_DENOISERS
  s_mode: PrefixMode = 'uniform_prefix'
  mode_tokens: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ul2r:
  """UL2 to continue a decoder-only model with. Source: Tay et al. 2022, arXiv:2210.11399, §2.2."""

  name: Literal['ul2r'] = 'ul2r'
  denoisers: tuple[Denoiser, ...] = UL2R_DENOISERS
  s_mode: PrefixMode = 'uniform_prefix'
  mode_tokens: bool = True


Objective = CausalLm | PrefixLm | SpanCorruption | Ul2 | Ul2r


# --- examples ------------------------------------------------------------------------------------


def split_prefix(tokens: Ids, prefix: int) -> tuple[Ids, Ids]:
  """
  >>> [side.tolist() for side in split_prefix(np.array([5, 6, 7]), 1)]
  [[5], [6, 7]]
  """
  return tokens[:prefix], tokens[prefix:]


def uniform_prefix(length: int, rng: np.random.Generator) -> int:
  """U{1 .. length - 1}; 0 where there is but one token. Source: preprocessors.random_prefix_noise_mask."""
  return 1 + int(rng.random() * (length - 1)) if length > 1 else 0


def last_quarter(length: int) -> int:
  """The prefix that leaves the last quarter (Table 1 of UL2 read as r = 0.25, one span)."""
  return length - max(1, round(length / 4)) if length > 1 else 0


def corrupt(tokens: Ids, mask: np.ndarray, first_sentinel: int) -> tuple[Ids, Ids]:
  """(inputs, targets) of span corruption under `mask`, without EOS.

  >>> [side.tolist() for side in corrupt(np.array([5, 6, 7, 8]), np.array([False, True, True, False]), 99)]
  [[5, 99, 8], [99, 6, 7, 98]]
  """
  inputs = noise_span_to_unique_sentinel(tokens, mask, first_sentinel)
  return inputs, nonnoise_span_to_unique_sentinel(tokens, mask, first_sentinel)


# --- tasks ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
  """`example(tokens, rng)` -> (inputs, targets) as they stand in a row; `costs(n)` bounds their lengths for n tokens."""

  label: str
  rate: float
  example: Callable[[Ids, np.random.Generator], tuple[Ids, Ids]]
  costs: Callable[[int], tuple[int, int]]
  spans: Callable[[int], int]


def tasks(objective: Objective, vocabulary: Vocabulary, *, encoder: bool) -> tuple[Task, ...]:
  """The tasks of an objective. With an encoder both sides end with EOS; in one stream only the targets do."""
  match objective:
    case CausalLm():
      nothing = np.zeros(0, np.int32)
      return (Task('causal', 1.0, lambda tokens, rng: (nothing, tokens), lambda n: (0, n), lambda n: 0),)
    case PrefixLm():
      return (_prefix_task('prefix', 1.0, None, 'uniform_prefix', encoder),)
    case SpanCorruption():
      density, mean = objective.noise_density, objective.mean_noise_span_length
      return (_span_task('span', 1.0, None, density, mean, objective.random_roll, vocabulary, encoder),)
    case Ul2() | Ul2r():
      return tuple(_denoiser_task(d, objective, vocabulary, encoder) for d in objective.denoisers)
    case _:
      assert_never(objective)


def _denoiser_task(d: Denoiser, objective: Ul2 | Ul2r, vocabulary: Vocabulary, encoder: bool) -> Task:
  mode = vocabulary.mode(MODE_OF_KIND[d.kind]) if objective.mode_tokens else None
  if d.kind == 'S':
    return _prefix_task('S', d.rate, mode, objective.s_mode, encoder)
  density, mean = d.noise_density, d.mean_noise_span_length
  return _span_task(d.kind, d.rate, mode, density, mean, False, vocabulary, encoder)


def _dress(inputs: Ids, targets: Ids, mode: int | None, ends: tuple[bool, bool]) -> tuple[Ids, Ids]:
  """The mode token before the inputs, EOS after the sides that have one."""
  head = [] if mode is None else [mode]
  eos = [EOS]
  return (
    np.concatenate([head, inputs, eos if ends[0] else []]).astype(np.int32),
    np.concatenate([targets, eos if ends[1] else []]).astype(np.int32),
  )


def _without_eos(tokens: Ids) -> Ids:
  """A document's own EOS is said by the example's."""
  return tokens[:-1] if len(tokens) and tokens[-1] == EOS else tokens


def _span_task(label, rate, mode, density, mean, roll, vocabulary: Vocabulary, encoder: bool) -> Task:
  def example(tokens: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
    tokens = _without_eos(tokens)
    mask = random_spans_noise_mask(len(tokens), density, mean, rng, roll) if len(tokens) else np.zeros(0, bool)
    return _dress(*corrupt(tokens, mask, vocabulary.first_sentinel), mode, (encoder, True))

  def spans(n: int) -> int:
    return noise_counts(n, density, mean)[1] + roll  # rolled round the end, one span may be cut in two

  def costs(n: int) -> tuple[int, int]:
    noise = noise_counts(n, density, mean)[0]
    sides = (mode is not None) + n - noise + spans(n) + encoder, noise + spans(n) + 1
    return sides if n > 1 else (sides[0] + 1, sides[1])  # one token alone is never noise

  return Task(f'{label}(mu={mean:g}, r={density:g})', rate, example, costs, spans)


def _prefix_task(label, rate, mode, s_mode: PrefixMode, encoder: bool) -> Task:
  def example(tokens: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
    tokens = _without_eos(tokens) if encoder else tokens
    n = len(tokens)
    prefix = uniform_prefix(n, rng) if s_mode == 'uniform_prefix' else last_quarter(n)
    return _dress(*split_prefix(tokens, prefix), mode, (encoder, encoder))

  def costs(n: int) -> tuple[int, int]:
    most = (max(n - 1, 0), max(n - 1, 1)) if s_mode == 'uniform_prefix' else (last_quarter(n), n - last_quarter(n - 1))
    if not encoder:
      most = (0, n)  # in one stream only the sum counts
    return (mode is not None) + most[0] + encoder, most[1] + encoder

  return Task(label, rate, example, costs, lambda n: 0)


def largest_piece(task: Task, inputs_length: int, targets_length: int) -> int:
  """The most tokens of a document that one row can hold."""
  fits = lambda n: _fits(task.costs(n), inputs_length, targets_length)
  low, high = 1, 4 * (inputs_length + targets_length)
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low


def _fits(costs: tuple[int, int], inputs_length: int, targets_length: int) -> bool:
  if inputs_length == 0:
    return sum(costs) <= targets_length
  return costs[0] <= inputs_length and costs[1] <= targets_length


def check_objective(objective: Objective, inputs_length: int, targets_length: int, sentinels: int) -> None:
  """Raises ValueError where denoisers are not described, do not fit the lengths, or need more sentinels than there are."""
  for i, d in enumerate(getattr(objective, 'denoisers', ())):
    described = d.mean_noise_span_length is not None and d.noise_density is not None
    if (d.kind != 'S') != described:
      fix = 'needs both' if d.kind != 'S' else 'has a prefix; it takes neither'
      raise ValueError(
        f"objective.denoisers[{i}] of kind '{d.kind}': mean_noise_span_length={d.mean_noise_span_length}, "
        f'noise_density={d.noise_density}; {d.kind} {fix}.'
      )
    if d.rate <= 0:
      raise ValueError(f'objective.denoisers[{i}].rate={d.rate}; a denoiser that is never used should be removed.')
  plain = dataclasses.replace(objective, mode_tokens=False) if hasattr(objective, 'mode_tokens') else objective
  shortest = 16
  if max(inputs_length or shortest, shortest) != (inputs_length or shortest) or targets_length < shortest:
    raise ValueError(
      f'data.inputs_length={inputs_length}, data.targets_length={targets_length}; rows need at least 16.'
    )
  for task in tasks(plain, Vocabulary(10**6, sentinels), encoder=inputs_length > 0):
    need = task.spans(largest_piece(task, inputs_length, targets_length))
    if need > sentinels:
      length = f'{inputs_length} inputs' if inputs_length else f'{targets_length} tokens'
      raise ValueError(
        f'data.sentinels={sentinels} but denoiser {task.label} at {length} makes {need} spans; set data.sentinels >= {need}.'
      )
