"""Muon: the orthogonalised momentum of each layer's matrix; other parameters are updated by Adam."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.specs import ParamSpec
from pretrain.optim.shared import Shared, num_stacked, sides

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Shared):
  """Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, and its reference code, Nesterov included.

  `update_scale`: 'moonlight', 0.2 sqrt(max(rows, columns)), has AdamW's update RMS, so that one learning rate serves
  all parameters (Liu et al. 2025, arXiv:2502.16982, eq. 4); 'jordan' is sqrt(max(1, outputs / inputs)). `b1`, `b2` and
  `eps` are those of Adam for embeddings, heads, norms and biases.
  """

  name: Literal['muon'] = 'muon'
  weight_decay: Annotated[float, '>= 0'] = 0.1
  momentum: Annotated[float, '[0, 1)'] = 0.95
  update_scale: Literal['moonlight', 'jordan'] = 'moonlight'
  b1: Annotated[float, '[0, 1)'] = 0.9
  b2: Annotated[float, '[0, 1)'] = 0.95
  eps: Annotated[float, '> 0'] = 1e-8


class MuonState(NamedTuple):
  count: Array
  mu: Any


def is_hidden_matrix(spec: ParamSpec) -> bool:
  return sides(spec) is not None and 'vocab' not in spec.axes


def newton_schulz(x: Array) -> Array:
  """The nearest orthogonal matrix of each of x […, rows, columns], singular values within 0.7 .. 1.2; bf16."""
  a, b, c = COEFFICIENTS
  x = x.astype(jnp.float32)
  x = (x / (jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True)) + 1e-7)).astype(jnp.bfloat16)
  for _ in range(STEPS):
    gram = x @ x.mT
    x = a * x + (b * gram + c * (gram @ gram)) @ x
  return x


def orthogonal(x: Array, spec: ParamSpec, mesh: Mesh | None) -> Array:
  """x with each layer's matrix made orthogonal, heads joined with head_dim; on a mesh, whole layers to a device.

  Each expert has a matrix in each layer, which stays on the devices that hold the expert.
  """
  stacked = tuple(range(num_stacked(spec)))
  apart = mesh is not None and mesh.shape['expert'] > 1 and 'experts' in spec.axes
  if apart:
    stacked = tuple(sorted(stacked, key=lambda i: spec.axes[i] != 'experts'))
  short, long = sorted(sides(spec), key=lambda dims: math.prod(x.shape[i] for i in dims))  # the smaller Gram matrix
  order = (*stacked, *short, *long)
  count, rows = (math.prod(x.shape[i] for i in dims) for dims in (stacked, short))
  moved = jnp.transpose(x, order)
  if apart:
    matrices = by_expert(moved.reshape(x.shape[stacked[0]], -1, rows, moved.size // count // rows), newton_schulz, mesh)
  else:
    matrices = by_layer(moved.reshape(count, rows, -1), newton_schulz, mesh)
  return jnp.transpose(matrices.reshape(moved.shape), np.argsort(order)).astype(x.dtype)


def by_layer(x: Array, f, mesh: Mesh | None) -> Array:
  """f(x) for matrices sharded over fsdp, computed on whole matrices spread over fsdp: two all-to-alls, no all-gather.

  By default the partitioner gives every device the whole stack. Layers are padded to fill the devices.
  """
  if mesh is None or mesh.shape['fsdp'] == 1:
    return f(x)
  place = NamedSharding(mesh, PartitionSpec('fsdp', None, None))
  padded = jnp.pad(x, ((0, -len(x) % mesh.shape['fsdp']), (0, 0), (0, 0)))
  done = f(jax.lax.with_sharding_constraint(padded, place))
  return jax.lax.with_sharding_constraint(done, place)[: len(x)]


def by_expert(x: Array, f, mesh: Mesh) -> Array:
  """`by_layer` of x[experts, layers, rows, columns] with the experts on their devices along `expert`."""
  place, layers = NamedSharding(mesh, PartitionSpec('expert', 'fsdp', None, None)), x.shape[1]
  padded = jnp.pad(x, ((0, 0), (0, -layers % mesh.shape['fsdp']), (0, 0), (0, 0)))
  done = f(jax.lax.with_sharding_constraint(padded, place))
  return jax.lax.with_sharding_constraint(done, place)[:, :layers]


def update_scale(spec: ParamSpec, cfg: Muon) -> float:
  first, second = sorted(sides(spec))
  inputs, outputs = (math.prod(spec.shape[i] for i in dims) for dims in (first, second))
  return 0.2 * math.sqrt(max(inputs, outputs)) if cfg.update_scale == 'moonlight' else max(1, outputs / inputs) ** 0.5


def scale_by_muon(cfg: Muon, specs: Mapping[str, Any], mesh: Mesh | None) -> optax.GradientTransformation:
  """Orthogonalised Nesterov momentum; all parameters must be hidden matrices."""

  def init(params):
    return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params=None):
    mix = lambda old, new: cfg.momentum * old + (1 - cfg.momentum) * new
    mu = jax.tree.map(mix, state.mu, grads)
    ahead = jax.tree.map(mix, mu, grads)
    updates = jax.tree.map(lambda spec, x: update_scale(spec, cfg) * orthogonal(x, spec, mesh), specs, ahead)
    return updates, MuonState(state.count + 1, mu)

  return optax.GradientTransformation(init, update)
