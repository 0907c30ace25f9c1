"""T5's bias inside a tile. It depends on distance alone, so a tile holds one strip of numbers, shifted from row to row.

tile[r, c] = strip[rows + c - r]. In fast memory lies toe[s, x] = strip[x - s] for s < 128, made by one strided roll;
rows [a, a + 128) of the tile are then toe[:, rows - a : rows - a + columns], an aligned load. The gradient goes the
same way backwards. Strips and the two numbers of saturated tiles are plain JAX of the table: its VJP makes the table's.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.reference import relative_position_bucket
from pallas_kernels.attention.tiles import Spec

LANES = 128


def expand(table: Array, spec: Spec, hidden: float) -> tuple[Array, Array, Array]:
  """(strips f32[heads, near offsets, block_q + compute], the same of transposed tiles, saturated f32[heads, 2]).

  Keys ahead of the query are `hidden` where causality goes by indices: the diagonal's tiles then need no mask.
  """
  width, far = spec.block_q + spec.compute, spec.max_distance
  distance = jnp.arange(-far, far + 1)
  bucket = relative_position_bucket(
    distance, buckets=table.shape[0], bidirectional=spec.bidirectional, max_distance=far
  )
  near = table.astype(jnp.float32)[bucket].T
  offsets, x = np.asarray(spec.near_offsets)[:, None], np.arange(width)[None]

  def pick(distance):
    strip = near[:, np.clip(distance, -far, far) + far]
    return jnp.where(distance > 0, hidden, strip) if spec.diagonal else strip

  return pick(offsets + x - spec.block_q), pick(offsets + spec.compute - x), near[:, np.array([0, 2 * far])]


def build(strips, toe) -> None:
  """toe[n, s, x] = strips[n, x - s]."""
  for n in range(strips.shape[0]):
    toe[n] = pltpu.roll(jnp.broadcast_to(strips[n : n + 1, :], toe.shape[1:]), 0, 1, stride=1, stride_axis=0)


def load(toe, n, rows: int, columns: int) -> Array:
  """The bias of a tile."""
  parts = [toe[n, :, pl.ds(rows - a, columns)] for a in range(0, rows, LANES)]
  return jnp.concatenate(parts, axis=0)


def add(toe, n, tile: Array) -> None:
  """The reverse of `load`: adds a tile's gradient where its bias came from."""
  rows, columns = tile.shape
  for x in range(LANES, rows + columns, LANES):
    starts = [(a, x - rows + a) for a in range(0, rows, LANES)]
    parts = [tile[a : a + LANES, b : b + LANES] for a, b in starts if 0 <= b < columns]
    toe[n, :, x : x + LANES] += functools.reduce(jnp.add, parts)


def fold(x: Array) -> Array:
  """[128, width] -> [1, width]: the sum over s of x[s, i + s], by halves, with uniform rolls."""
  while x.shape[0] > 1:
    half, width = x.shape[0] // 2, x.shape[1]
    x = x[:half] + pltpu.roll(x[half:], width - half, 1)
  return x


def partial_sum(x: Array) -> Array:
  """[rows, columns] -> [8, 128] with the same sum: aligned slices are added, which costs vector adds alone."""
  x = functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])
  while x.shape[0] > 8:
    x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
  return x
