"""Averages of weights: a moving average during the run, and combinations of checkpoints. Pure functions on dicts."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, assert_never

import jax
import jax.numpy as jnp
from jax import Array

from pretrain.step.train_step import NOTHING, Seen, Track, Tracks

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoAveraging:
  name: Literal['none'] = 'none'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
  """Exponential moving average of the parameters after each update. Source: Polyak and Juditsky 1992.

  Up to `start_step` it is a copy of them. With `warmup`, update t multiplies the old average by
  min(decay, (1 + t) / (10 + t)). Source: tf.train.ExponentialMovingAverage, `num_updates`.
  """

  name: Literal['ema'] = 'ema'
  decay: Annotated[float, '[0, 1)'] = 0.999
  warmup: bool = False
  start_step: Annotated[int, '>= 0'] = 0


Averaging = NoAveraging | Ema


def averaging_tracks(cfg: Averaging) -> Tracks:
  """What averaging keeps in `TrainState.extra`: nothing, or 'ema', float32 in the shapes of the parameters."""
  match cfg:
    case NoAveraging():
      return NOTHING
    case Ema():
      place = lambda params, everywhere: params
      return {'ema': Track(lambda params: jax.tree.map(_float32, params), _ema_update(cfg), place)}
    case _:
      assert_never(cfg)


def ema_decay(cfg: Ema, step: Array) -> Array:
  """The weight of the old average in update `step` (the first is 1): 0 up to `start_step`, which makes it a copy."""
  counted = jnp.maximum(step - cfg.start_step, 0).astype(jnp.float32)
  decay = jnp.minimum(cfg.decay, (1 + counted) / (10 + counted)) if cfg.warmup else cfg.decay
  return jnp.where(counted > 0, decay, 0.0)


def _ema_update(cfg: Ema) -> Callable[[Params, Seen, Params, Array], Params]:
  def update(average: Params, seen: Seen, params: Params, step: Array):
    decay = ema_decay(cfg, step)
    # Not ema + (1 - decay) * (param - ema), which for a decay of 0 is not the parameter to the last bit.
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * _float32(p), average, params)

  return update


def _float32(x: Array) -> Array:
  return x.astype(jnp.float32)


_scale = jax.jit(lambda tree, c: jax.tree.map(lambda x: c * _float32(x), tree))
_add = jax.jit(lambda total, tree, c: jax.tree.map(lambda t, x: t + c * _float32(x), total, tree), donate_argnums=0)
_mix = jax.jit(lambda a, b, c: jax.tree.map(lambda x, y: x + c * (y - x), a, b), donate_argnums=1)


def linear_combination(terms: Iterable[tuple[float, Params]]) -> Params:
  """The sum of coefficient * tree, float32. Trees are read one at a time, so memory holds the sum and one tree.

  >>> linear_combination([(0.25, {'w': jnp.float32(4.0)}), (0.75, {'w': jnp.float32(8.0)})])['w'].item()
  7.0
  """
  total = None
  for coefficient, tree in terms:
    c = jnp.float32(coefficient)
    # Waiting, and `del`, so that this tree is gone before the next one is read.
    total = jax.block_until_ready(_scale(tree, c) if total is None else _add(total, tree, c))
    del tree
  if total is None:
    raise ValueError('a combination of no trees')
  return total


def normalized(weights: Sequence[float]) -> list[float]:
  """Weights that sum to 1."""
  return [w / sum(weights) for w in weights]


def task_vector_coefficients(coefficients: Sequence[float]) -> list[float]:
  """Coefficients of (base, *inputs) in base + sum c_i * (input_i - base).

  Source: Ilharco et al. 2023, arXiv:2212.04089.

  >>> task_vector_coefficients([0.5, 0.25])
  [0.25, 0.5, 0.25]
  """
  return [1 - sum(coefficients), *coefficients]


def lawa_steps(step: int, every: int, count: int) -> list[int]:
  """The last `count` multiples of `every` up to `step`, oldest first; some are not positive early in a run.

  Source: Kaddour 2022, arXiv:2209.14981 (LAWA); Sanyal et al. 2023, arXiv:2306.03241: checkpoints far apart.

  >>> lawa_steps(700, 100, 3), lawa_steps(150, 100, 2)
  ([500, 600, 700], [0, 100])
  """
  newest = step // every * every
  return [newest - every * i for i in reversed(range(count))]


@dataclasses.dataclass(frozen=True)
class Tasted:
  """A decision of `greedy_soup`: `score` belongs to the soup with ingredient `index`, `before` to the one without."""

  index: int
  score: float
  before: float
  kept: bool


def greedy_soup(
  scores: Sequence[float],
  read: Callable[[int], Params],
  score: Callable[[Params], float],
  tell: Callable[[Tasted], Any],
) -> Params:
  """The mean of those trees that do not raise its score, tried in the order of their own scores, the lowest first.

  Memory holds two trees: the soup, and the tree being tried. A score that is NaN is higher than any.
  Source: Wortsman et al. 2022, arXiv:2203.05482, algorithm 1.
  """
  best, *others = sorted(range(len(scores)), key=lambda i: (scores[i] != scores[i], scores[i]))
  soup, lowest, count = read(best), scores[best], 1
  tell(Tasted(best, lowest, math.inf, True))
  for index in others:
    tried = _mix(soup, read(index), jnp.float32(1 / (count + 1)))
    now = score(tried)
    kept = now <= lowest
    tell(Tasted(index, now, lowest, kept))
    if kept:
      soup, lowest, count = tried, now, count + 1
    del tried  # before the next one is read
  return soup
