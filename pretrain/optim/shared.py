"""What optimizers share: their common keys, and what a parameter's axes say of its layers, matrices and decay."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from models.rendered import IF_SET
from models.specs import ParamSpec, is_matrix

StateDtype = Literal['float32', 'bfloat16', 'int8']
Offloaded = Literal['moments', 'parameters']
STACKED = ('layers', 'experts')  # leading axes along which a parameter is several, each with statistics of its own
ROWS, COLUMNS = ('embed',), ('vocab', 'mlp', 'heads', 'kv_heads', 'one_head', 'head_dim')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
  """Keys of every optimizer. Decay is times the learning rate; `state_dtype` is that of moments of a parameter's size.

  `parameter_scale` multiplies each update by the RMS of its parameter, layer by layer: T5's parameters are drawn at
  sizes a hundred times apart, for Adafactor, which does the same. Source: Shazeer and Stern 2018, arXiv:1804.04235, §8;
  with Adam: Nawrot 2023, arXiv:2309.02373, §3.

  `offload` keeps the moments of matrices, or the matrices of stacked layers themselves, in the host's memory
  (`optim.offload`).
  """

  weight_decay: Annotated[float, '>= 0'] = 0.01
  clip_norm: Annotated[float, '>= 0'] = 1.0  # 0 clips nothing
  parameter_scale: bool = False
  max_consecutive_nonfinite: Annotated[int, '>= 1'] = 5
  state_dtype: StateDtype = 'float32'
  offload: tuple[Offloaded, ...] = dataclasses.field(default=(), metadata=IF_SET)


def num_stacked(spec: ParamSpec) -> int:
  """How many leading dims stack parameters; an `experts` behind a feature (a router's) is a feature."""
  return next((i for i, axis in enumerate(spec.axes) if axis not in STACKED), len(spec.axes))


def own_dims(spec: ParamSpec) -> tuple[int, ...]:
  """The dims of one layer's parameter: what norms, RMS and clipping average over."""
  return tuple(range(num_stacked(spec), len(spec.axes)))


def own_size(spec: ParamSpec) -> int:
  return math.prod(spec.shape[i] for i in own_dims(spec))


def decays(spec: ParamSpec) -> bool:
  """Matrices decay; norm scales, biases and bias tables do not."""
  return is_matrix(spec)


def sides(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """(row dims, column dims) of each layer's matrix: `embed` against all others, heads joined with head_dim.

  None for what is no matrix: one side is empty, or an axis belongs to neither. Source: T5X adafactor.py
  standard_logical_factor_rules.
  """
  rows = tuple(i for i in own_dims(spec) if spec.axes[i] in ROWS)
  columns = tuple(i for i in own_dims(spec) if spec.axes[i] in COLUMNS)
  return (rows, columns) if rows and columns and len(rows + columns) == len(own_dims(spec)) else None


def noise(shape: tuple[int, ...], salt: Array) -> Array:
  """uint32 of this shape, a hash of `salt` (uint32) and the index in the whole array: equal on all meshes."""
  place = jnp.zeros(shape, jnp.uint32)
  for i, stride in enumerate(np.cumprod((1, *shape[:0:-1]))[::-1]):
    place += jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(stride % 2**32)
  mixed = place * jnp.uint32(0x9E3779B1) + salt
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finalizer
    mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
  return mixed


def scale_by_parameter(specs: Mapping[str, Any], smallest: float = 1e-3) -> optax.GradientTransformation:
  """Updates times the RMS of their parameter, at least `smallest`; stacked layers each have their own."""

  def scaled(spec: ParamSpec, update: Array, param: Array) -> Array:
    rms = jnp.sqrt(jnp.mean(jnp.square(param), own_dims(spec), keepdims=True))
    return update * jnp.maximum(rms, smallest)

  def update(updates, state, params=None):
    return jax.tree.map(scaled, specs, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
