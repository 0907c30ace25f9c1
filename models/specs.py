"""Parameters are descriptions: shape, logical axes, init. A model holds no arrays; these functions make them."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Normal:
  """std = scale / sqrt(product of the sizes of the `fan_in` axes). Frozen: two builds compare equal."""

  scale: float = 1.0
  fan_in: tuple[str, ...] = ()

  def std(self, shape, axes) -> float:
    return self.scale / math.sqrt(math.prod(dim for dim, axis in zip(shape, axes, strict=True) if axis in self.fan_in))

  def __call__(self, key, shape, dtype, axes) -> Array:
    return (self.std(shape, axes) * jax.random.normal(key, shape)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class UniformFanAvg:
  """Uniform of variance 1 / mean(sizes of all axes but `layers`). Source: T5X relative_position_biases.py (fan_avg)."""

  def std(self, shape, axes) -> float:
    dims = [dim for dim, axis in zip(shape, axes, strict=True) if axis != 'layers']
    return math.sqrt(len(dims) / sum(dims))

  def __call__(self, key, shape, dtype, axes) -> Array:
    limit = math.sqrt(3) * self.std(shape, axes)
    return jax.random.uniform(key, shape, dtype, -limit, limit)


@dataclasses.dataclass(frozen=True)
class Orthogonal:
  """A random square matrix whose transpose is its inverse, from the Haar measure. Source: Saxe et al. 2013,
  arXiv:1312.6120; Mezzadri 2006, arXiv:math-ph/0609050, §5: signs of the diagonal of R."""

  def std(self, shape, axes) -> float:
    return shape[0] ** -0.5

  def __call__(self, key, shape, dtype, axes) -> Array:
    q, r = jnp.linalg.qr(jax.random.normal(key, shape))
    return (q * jnp.sign(jnp.diagonal(r))).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Ones:
  def std(self, shape, axes) -> float:
    return 0.0

  def __call__(self, key, shape, dtype, axes) -> Array:
    return jnp.ones(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Zeros:
  def std(self, shape, axes) -> float:
    return 0.0

  def __call__(self, key, shape, dtype, axes) -> Array:
    return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """Describes a parameter that has no values yet."""

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str, ...]
  init: Any


def weight(shape: tuple[int, ...], axes: tuple[str, ...], init) -> nnx.Param:
  """A parameter without values. `axes`, not `sharding_names`: NNX shards the latter eagerly, and needs a mesh to."""
  if len(shape) != len(axes):
    raise ValueError(f'shape {shape} has {len(shape)} dims, axes {axes} name {len(axes)}.')
  return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init)


def cast(param: nnx.Param, like: Array) -> Array:
  """The parameter's values in the compute dtype of `like`."""
  return param[...].astype(like.dtype)


def is_variable(x) -> bool:
  return isinstance(x, nnx.Variable)


def is_spec(x) -> bool:
  return isinstance(x, ParamSpec)


def stack(module: nnx.Module, num: int) -> nnx.Module:
  """The same module, each parameter with a leading `layers` axis of size `num`; scan over it."""

  def grow(v):  # `layers` is in no fan_in, so each layer is drawn as without stacking
    spec = v.get_value()
    axes = ('layers', *v.get_metadata()['axes'])
    return v.replace(jax.ShapeDtypeStruct((num, *spec.shape), spec.dtype), axes=axes)

  graph, state = nnx.split(module)
  return nnx.merge(graph, jax.tree.map(grow, state, is_leaf=is_variable))


def param_specs(module: nnx.Module) -> Tree:
  """The module's parameters as a nested dict of ParamSpec."""

  def describe(v):
    value, meta = v.get_value(), v.get_metadata()
    return v.replace(ParamSpec(value.shape, value.dtype, meta['axes'], meta['init']))

  return nnx.to_pure_dict(jax.tree.map(describe, nnx.state(module), is_leaf=is_variable))


def initialize(specs: Tree, key: Array) -> Tree:
  """Draws each parameter from a key folded from its own path: adding a parameter changes no other."""

  def draw(path, spec: ParamSpec):
    own = zlib.crc32('/'.join(str(p.key) for p in path).encode())
    return spec.init(jax.random.fold_in(key, own), spec.shape, spec.dtype, spec.axes)

  return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=is_spec)


def is_matrix(spec: ParamSpec) -> bool:
  """Whether the parameter maps one feature space to another; norm scales, biases and bias tables do not.

  `heads` and `head_dim` together are one space.

  >>> is_matrix(ParamSpec((8, 2, 4), None, ('embed', 'heads', 'head_dim'), None))
  True
  >>> is_matrix(ParamSpec((2, 4), None, ('heads', 'head_dim'), None))
  False
  """
  return len([axis for axis in spec.axes if axis not in ('layers', 'buckets', 'head_dim')]) >= 2


def count(specs: Tree) -> int:
  """The number of parameters."""
  return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))


def as_function(module: nnx.Module):
  """`bind(params)`: the module with these arrays in it; params is a plain nested dict."""
  graph, state = nnx.split(module)

  def bind(params: Tree) -> nnx.Module:
    own = jax.tree.map(lambda v: v, state, is_leaf=is_variable)
    nnx.replace_by_pure_dict(own, params)
    return nnx.merge(graph, own)

  return bind
