"""Rounding to the values of an element, to the nearest or at random: the same bits on every platform and any tiling.

Only operations that are exact in float32 are used (comparison, floor, products with powers of two), and random bits
come from a hash of a number's place in its matrix. So a tile or a device rounds as the whole array does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized_matmul.formats import Element

COLUMN, ROW = 0x85EBCA77, 0x9E3779B1  # odd: multiples of them differ for all 2**32 indices
FRACTION_BITS, EXPONENT_BIAS = 23, 127
EXPONENT_MASK, HALF = 0xFF << FRACTION_BITS, 1 << (FRACTION_BITS - 1)


class Noise(NamedTuple):
  """Where the random bits of an array come from: `seed` uint32, and uint32 numbers of its rows and of its columns.

  Without `columns` these are the last dim, and `rows` has the other dims. With them both have the dims of the array, of
  size 1 where a number does not depend on it. Rows that differ anywhere in a run have different numbers.
  """

  seed: Array
  rows: Array
  columns: Array | None = None

  def of(self, operand: int) -> 'Noise':
    """The same for another operand: no two of a product's share bits."""
    return self._replace(seed=mix(jnp.uint32(self.seed) + jnp.uint32(operand * ROW & 0xFFFFFFFF)))


def mix(x: Array) -> Array:
  """A bijection of uint32 in which every bit of the input flips about half of the output's.

  Source: MurmurHash3's fmix32 (Appleby, public domain).
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def row_hashes(noise: Noise) -> Array:
  """uint32 like `noise.rows`."""
  return mix(noise.rows * jnp.uint32(ROW) ^ noise.seed)


def bits(hashes: Array, columns: Array) -> Array:
  """uint32: the random bits at rows with these hashes and at these column indices, which broadcast."""
  return mix(hashes ^ (columns * jnp.uint32(COLUMN)))


def bits_of(noise: Noise, width: int) -> Array:
  """uint32: the random bits of an array whose last dim is `width`."""
  if noise.columns is not None:
    return bits(row_hashes(noise), noise.columns)
  return bits(row_hashes(noise)[..., None], jnp.arange(width, dtype=jnp.uint32))


def power_of_two(exponent: Array) -> Array:
  """2.0 ** exponent in float32, from its bits; exponents of normal numbers only."""
  return jax.lax.bitcast_convert_type((exponent + EXPONENT_BIAS) << FRACTION_BITS, jnp.float32)


def exponent_of(x: Array) -> Array:
  """int32: floor(log2(abs(x))) of a normal float32; -127 for 0, 128 for inf and NaN."""
  return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> FRACTION_BITS) & 0xFF) - EXPONENT_BIAS


def rounded(x: Array, element: Element, random: Array | None = None) -> Array:
  """float32 `x` as a value of `element`: to the nearest one, ties to even, or with `random` bits to one of its two
  neighbours, with the mean x. Beyond the largest value it is that value; NaN stays NaN.
  """
  if element.mantissa is None:
    nearby = jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN) if random is None else _either(x, random)
    return jnp.clip(nearby, -element.largest, element.largest)
  if random is None:
    return jnp.copysign(nearest(x, element), x)
  spacing = jnp.maximum(exponent_of(x), element.smallest_exponent) - element.mantissa
  spacing = jnp.minimum(spacing, EXPONENT_BIAS - 1)  # of inf and NaN
  nearby = _either(x * power_of_two(-spacing), random) * power_of_two(spacing)
  return jnp.clip(nearby, -element.largest, element.largest)


def nearest(x: Array, element: Element) -> Array:
  """`rounded` to the nearest value of a float element, but for the sign of zero, by the rounding of one addition: above
  1.5 * 2 ** (n + 23) neighbours in float32 are 2 ** n apart, so adding that number rounds to multiples of 2 ** n, and
  subtracting it is exact. That takes half the operations of rounding itself.
  """
  # First, so that no product is joined with the addition: it would not be rounded on its own.
  x = jnp.clip(x, -element.largest, element.largest)
  exponent = jax.lax.bitcast_convert_type(x, jnp.int32) & EXPONENT_MASK
  exponent = jnp.maximum(exponent, (element.smallest_exponent + EXPONENT_BIAS) << FRACTION_BITS)
  far = exponent + ((FRACTION_BITS - element.mantissa) << FRACTION_BITS | HALF)
  far = jax.lax.bitcast_convert_type(far, jnp.float32)
  return (x + far) - far


def _either(x: Array, random: Array) -> Array:
  low = jnp.floor(x)
  # x - low and 24 bits of a fraction are exact, so that the share rounded up is x - low within 2**-24.
  share = (random >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)
  return low + (share < x - low).astype(jnp.float32)
