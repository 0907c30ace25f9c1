"""T5's bias inside a tile. It depends on distance alone, so a tile holds one line of numbers, shifted from row to row.

All tiles are pieces of one line by distance: tile[r, c] = line[start + rows + c - r]. In fast memory lies
toe[s, x] = line[x - s] for s < 128, made by one strided roll; rows [a, a + 128) of the tile are then
toe[:, start + rows - a : start + rows - a + columns], an aligned load. The gradient goes the same way backwards.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.reference import relative_position_bucket
from pallas_kernels.attention.tiles import LANES, Spec


def length(spec: Spec) -> int:
  """The length of the line."""
  return (len(spec.near_offsets) - 1) * spec.compute + spec.block_q + spec.compute


def buckets_at(spec: Spec, distance: np.ndarray) -> np.ndarray:
  return relative_position_bucket(
    distance, buckets=spec.buckets, bidirectional=spec.bidirectional, max_distance=spec.max_distance
  )


def saturated(spec: Spec) -> list[int]:
  """The buckets of keys far before the query, and far behind it."""
  return buckets_at(spec, np.array([-spec.max_distance, spec.max_distance])).tolist()


def build(numbers, spec: Spec, toe, *, hidden: float, transposed: bool) -> None:
  """toe[s, x] = line[x - s], where `numbers[bucket]` is the bias. The kernel computes it: in XLA it took longer than
  all tiles.

  Keys after the query are `hidden` where causality goes by indices: tiles on the diagonal then need no mask.
  """
  offsets, steps = spec.near_offsets, jax.lax.broadcasted_iota(jnp.int32, (1, length(spec)), 1)
  distance = offsets[-1] + spec.compute - steps if transposed else steps + (offsets[0] - spec.block_q)
  far = np.arange(-spec.max_distance, spec.max_distance + 1)
  bucket = buckets_at(spec, far)
  line = jnp.full(distance.shape, numbers[bucket[0]])
  for n in np.flatnonzero(np.diff(bucket)) + 1:
    line = jnp.where(distance >= far[n], numbers[bucket[n]], line)
  line = jnp.where(distance > 0, hidden, line) if spec.diagonal else line
  toe[...] = pltpu.roll(jnp.broadcast_to(line, toe.shape), 0, 1, stride=1, stride_axis=0)


def table_gradient(spec: Spec, line: Array, ends: Array) -> Array:
  """f32[buckets, heads] from the gradients of the line f32[heads, length] and of saturated tiles f32[heads, 2]."""
  distance = spec.near_offsets[0] - spec.block_q + np.arange(length(spec))
  bucket = np.concatenate([buckets_at(spec, distance), saturated(spec)])
  own = jnp.asarray(bucket) == jnp.arange(spec.buckets)[:, None, None]
  return jnp.where(own, jnp.concatenate([line, ends], 1), 0.0).sum(-1)


def load(toe, start, rows: int, shape) -> Array:
  """The bias of a tile, or of its upper left corner of `shape`; `rows` is the height of the whole tile."""
  parts = [toe[:, _from(start + rows - a, shape[1])] for a in range(0, shape[0], LANES)]
  return jnp.concatenate(parts, axis=0)


def add(toe, start, rows: int, tile: Array) -> None:
  """The reverse of `load`: adds the gradient of a tile to the place of its bias."""
  for x in range(rows - tile.shape[0] + LANES, rows + tile.shape[1], LANES):
    starts = [(a, x - rows + a) for a in range(0, tile.shape[0], LANES)]
    parts = [tile[a : a + LANES, b : b + LANES] for a, b in starts if 0 <= b < tile.shape[1]]
    toe[:, _from(start + x, LANES)] += functools.reduce(jnp.add, parts)


def _from(start, size: int):
  return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), size)


def fold(x: Array) -> Array:
  """[128, width] -> [1, width]: the sum over s of x[s, i + s], by halves, with uniform rolls."""
  while x.shape[0] > 1:
    half, width = x.shape[0] // 2, x.shape[1]
    x = x[:half] + pltpu.roll(x[half:], width - half, 1)
  return x


def partial_sum(x: Array) -> Array:
  """[rows, columns] -> [8, 128] with the same sum: aligned slices are added, which needs only vector adds."""
  x = functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])
  while x.shape[0] > 8:
    x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
  return x
