"""Adafactor as in T5X: the second moment of each matrix is kept as row and column means, one pair per layer."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from models.specs import ParamSpec
from pretrain.optim.shared import Shared, num_stacked, own_dims, sides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Shared):
  """Source: Shazeer and Stern 2018, arXiv:1804.04235, and T5X's t5x/adafactor.py, whose updates it equals.

  `weight_decay` is multiplied by the learning rate, as in every optimizer here; T5X's `weight_decay_rate` is not.
  `momentum` (0: none) averages updates before they are multiplied by the learning rate; T5X averages after. Both are
  equal while the rate is constant.
  """

  name: Literal['adafactor'] = 'adafactor'
  weight_decay: Annotated[float, '>= 0'] = 0.0
  clip_norm: Annotated[float, '>= 0'] = 0.0
  parameter_scale: bool = True
  momentum: Annotated[float, '[0, 1)'] = 0.0
  decay_exponent: Annotated[float, '> 0'] = 0.8
  clipping_threshold: Annotated[float, '>= 0'] = 1.0  # of an update's RMS; 0 clips nothing
  min_dim_size_to_factor: Annotated[int, '>= 1'] = 128  # of matrices that are not stacked and have no heads, as in T5X
  epsilon: Annotated[float, '> 0'] = 1e-30


class Factored(NamedTuple):
  """Means of squared gradients, with the parameter's rank: rows have size 1 in its column dims, columns in its rows."""

  rows: Array
  columns: Array


class AdafactorState(NamedTuple):
  count: Array
  statistics: Any  # Factored, or the whole second moment, at each parameter's place


def factors(spec: ParamSpec, smallest: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """The dims of the factors: by size for an unstacked array of two dims, by axes otherwise (as T5X)."""
  if len(spec.shape) <= 2 and not num_stacked(spec):
    return ((0,), (1,)) if len(spec.shape) == 2 and min(spec.shape) >= smallest else None
  return sides(spec)


def scale_by_adafactor(cfg: Adafactor, specs: Mapping[str, Any]) -> optax.GradientTransformation:
  """Gradients over the root of their factored second moment, each layer's RMS clipped at `clipping_threshold`."""

  def empty(spec: ParamSpec) -> Array | Factored:
    if (dims := factors(spec, cfg.min_dim_size_to_factor)) is None:
      return jnp.zeros(spec.shape, jnp.float32)
    rows, columns = ([1 if i in gone else n for i, n in enumerate(spec.shape)] for gone in reversed(dims))
    return Factored(jnp.zeros(rows, jnp.float32), jnp.zeros(columns, jnp.float32))

  def init(params):
    return AdafactorState(jnp.zeros((), jnp.int32), jax.tree.map(empty, specs))

  def update(grads, state, params=None):
    decay = 1 - (state.count + 1.0) ** -cfg.decay_exponent

    def advance(grad: Array, old: Array) -> Array:
      gone = tuple(i for i, (a, b) in enumerate(zip(grad.shape, old.shape, strict=True)) if a != b)
      return decay * old + (1 - decay) * jnp.mean(jnp.square(grad) + cfg.epsilon, gone, keepdims=True)

    moved = jax.tree.map(lambda g, old: jax.tree.map(lambda o: advance(g, o), old), grads, state.statistics)
    updates = jax.tree.map(lambda spec, g, s: clipped(spec, normalized(spec, g, s)), specs, grads, moved)
    return updates, AdafactorState(state.count + 1, moved)

  def normalized(spec: ParamSpec, grad: Array, statistics: Array | Factored) -> Array:
    if not isinstance(statistics, Factored):
      return grad * statistics**-0.5
    rows, columns = statistics
    row_dims, _ = factors(spec, cfg.min_dim_size_to_factor)
    return grad * (rows / jnp.mean(rows, row_dims, keepdims=True)) ** -0.5 * columns**-0.5

  def clipped(spec: ParamSpec, update: Array) -> Array:
    if not cfg.clipping_threshold:
      return update
    rms = jnp.sqrt(jnp.mean(jnp.square(update), own_dims(spec), keepdims=True))
    return update / jnp.maximum(1.0, rms / cfg.clipping_threshold)

  return optax.GradientTransformation(init, update)
