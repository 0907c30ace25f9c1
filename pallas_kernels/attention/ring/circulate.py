"""The ring: queries stay, and keys and values with their vectors visit every device along an axis of the mesh.

Each device mixes what it has by an `Inner`, and merges partial results by their log-sum-exp. The backward pass sends
keys and values around again, together with their growing gradients. A hop does not depend on the work of its step, so
that it can hide behind it; the price is one hop more than needed in each direction.
Source: Liu et al. 2023, arXiv:2310.01889; merging: Rabe and Staats 2021, arXiv:2112.05682.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.tiles import KEPT

Arrays = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """A device's part of the queries, or of the keys and values: `arrays` in the layout of its `Inner`, and int32
  `vectors[number of vectors, ...]`, stacked so that one hop sends all.
  """

  arrays: tuple[Array, ...]
  vectors: Array


jax.tree_util.register_dataclass(Shard, data_fields=['arrays', 'vectors'], meta_fields=[])


class Inner(Protocol):
  """Attention of the queries of one shard over the keys of another. Hashable: it is a static property of the ring.

  `numbers` have a gradient; none of them is 'sinks'. Results are in f32, `lse` in the layout of `at_start`.
  """

  def at_start(self, q: Array, sinks: Array | None) -> Array:
    """The log-sum-exp before any key was seen: that of the sinks, or -inf."""

  def mix(self, queries: Shard, keys: Shard, numbers: Arrays) -> tuple[Array, Array]:
    """(out, lse); 0 and -inf for a query that sees none of these keys."""

  def pull(
    self, queries: Shard, keys: Shard, numbers: Arrays, result: tuple[Array, Array], gradients: tuple[Array, Array]
  ) -> tuple[Array, tuple[Array, Array], dict[str, Array]]:
    """The gradients of the queries, of (keys, values) and of `numbers`; `result` is (out, lse) over all shards."""

  def pull_sinks(self, sinks: Array, result: tuple[Array, Array], gradients: tuple[Array, Array]) -> Array:
    """The gradient of the sinks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """A device's arrays in the layout of `inner`, and the way `back` to [batch, heads, length, ...] of its result."""

  inner: Inner
  queries: Shard
  keys: Shard
  numbers: dict[str, Array]
  back: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
  """`axis` of the mesh, None for a single device."""

  inner: Any
  axis: str | None

  @property
  def devices(self) -> int:
    return 1 if self.axis is None else jax.lax.axis_size(self.axis)

  def send(self, tree):
    """What the device before this one had."""
    if self.devices == 1:
      return tree
    hops = [(n, (n + 1) % self.devices) for n in range(self.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, hops), tree)

  def each(self, visit, carry):
    """`carry` after `visit` on this device's own keys and those of all others."""
    if self.devices == 1:
      return visit(carry)
    return jax.lax.scan(lambda carry, _: (visit(carry), None), carry, length=self.devices)[0]


def merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
  """(out, lse) over the keys of both; lse is -inf for a query that sees no key."""
  (out, lse), (more, more_lse) = one, other
  top = jnp.maximum(lse, more_lse)
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  own, others = jnp.exp(lse - top), jnp.exp(more_lse - top)
  some = own + others > 0
  total = jnp.where(some, own + others, 1.0)
  out = out * (own / total)[..., None] + more * (others / total)[..., None]
  return out, jnp.where(some, top + jnp.log(total), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def circulate(ring: Ring, queries: Shard, keys: Shard, numbers: Arrays) -> tuple[Array, Array]:
  """(out in the dtype of the queries, lse f32) over the keys of all devices of the ring."""
  sinks, numbers = _without_sinks(numbers)
  q = queries.arrays[0]

  def visit(carry):
    keys, result = carry
    return ring.send(keys), merge(result, ring.inner.mix(queries, keys, numbers))

  start = jnp.zeros(q.shape, jnp.float32), ring.inner.at_start(q, sinks)
  _, (out, lse) = ring.each(visit, (keys, start))
  return out.astype(q.dtype), lse


def _without_sinks(numbers: Arrays) -> tuple[Array | None, dict[str, Array]]:
  return numbers.get('sinks'), {name: x for name, x in numbers.items() if name != 'sinks'}


def _forward(ring: Ring, queries: Shard, keys: Shard, numbers: Arrays):
  result = tuple(checkpoint_name(x, KEPT) for x in circulate(ring, queries, keys, numbers))
  return result, (queries, keys, numbers, result)


def _backward(ring: Ring, saved, gradients):
  (queries, keys, numbers, result), inner = saved, ring.inner
  sinks, others = _without_sinks(numbers)
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)

  def visit(carry):
    keys, of_keys, so_far = carry
    travelled = ring.send(of_keys)  # of the keys that are here now
    dq, dkv, dnumbers = inner.pull(queries, keys, others, result, gradients)
    return ring.send(keys), _added(travelled, dkv), _added(so_far, (dq, dnumbers))

  start = keys, zeros(keys.arrays), (zeros(queries.arrays[0]), zeros(others))
  _, of_keys, (dq, dnumbers) = ring.each(visit, start)
  found = {name: x.astype(numbers[name].dtype) for name, x in dnumbers.items()}
  if sinks is not None:
    found['sinks'] = inner.pull_sinks(sinks, result, gradients)
  home = ring.send(tuple(g.astype(x.dtype) for g, x in zip(of_keys, keys.arrays, strict=True)))
  none = lambda x: np.zeros(x.shape, jax.dtypes.float0)
  of_queries = Shard(arrays=(dq.astype(queries.arrays[0].dtype),), vectors=none(queries.vectors))
  return of_queries, Shard(arrays=home, vectors=none(keys.vectors)), found


def _added(one, other):
  return jax.tree.map(jnp.add, one, other)


circulate.defvjp(_forward, _backward)
