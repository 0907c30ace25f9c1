"""Rotary positions on TPU: one pass over queries or keys that reads and writes their own dtype, computed in float32.

Left to the compiler, the halves of a head of 128 are slices of half a register: they are written to memory, padded to
whole ones, and so is the head in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCKS = (2048, 1024, 512, 256, 128)
VALUES = 2048 * 128  # of a block at most: two copies of each of four arrays are in VMEM, and f32 between


def fits(shape: tuple[int, ...], dims: int) -> bool:
  """Whether `rotate` takes an x[batch, heads, length, head_dim] of which `dims` are rotated."""
  return shape[3] == dims and dims % LANES == 0 and shape[2] % BLOCKS[-1] == 0 and dims * BLOCKS[-1] <= VALUES


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate(x: Array, sin: Array, cos: Array, interpret: bool = False) -> Array:
  """`x[batch, heads, length, head_dim]` with pairs (i, i + head_dim / 2) turned by the angles of `sin` and `cos`.

  Both are f32[batch, length, head_dim / 2], and have no gradient.
  """
  length, dim = x.shape[2:]
  rows = next(block for block in BLOCKS if length % block == 0 and block * dim <= VALUES)
  heads = pl.BlockSpec((None, None, rows, dim), lambda row, block, head: (row, head, block, 0))
  angles = pl.BlockSpec((None, rows, dim), lambda row, block, head: (row, block, 0))
  return pl.pallas_call(
    functools.partial(_kernel, half=dim // 2), name='rotary', grid=(x.shape[0], length // rows, x.shape[1]),
    in_specs=[heads, angles, angles], out_specs=heads, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    interpret=interpret,
  )(x, jnp.concatenate([-sin, sin], -1), jnp.concatenate([cos, cos], -1))  # fmt: skip


def _kernel(x, sin, cos, out, *, half: int):
  own = x[...].astype(jnp.float32)
  out[...] = (own * cos[...] + pltpu.roll(own, half, 1) * sin[...]).astype(out.dtype)


def _forward(x: Array, sin: Array, cos: Array, interpret: bool):
  return rotate(x, sin, cos, interpret), (sin, cos)


def _backward(interpret: bool, saved: tuple[Array, Array], gradient: Array):
  """Turned back."""
  sin, cos = saved
  return rotate(gradient, -sin, cos, interpret), None, None


rotate.defvjp(_forward, _backward)
