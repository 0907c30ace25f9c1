"""The definition: how a matrix is quantized, and the product of two quantized matrices in plain JAX.

A group of numbers shares a scale, so that the largest of them is the largest value of the element:
- float32 scales: scale = amax / largest, code = round(x * (largest / amax));
- mx: scale = 2 ** (floor(log2(amax)) - floor(log2(largest))), OCP MX 1.0, §6.3; values above the largest saturate;
- nvfp4: a float32 scale amax / (6 * 448) of the whole matrix, under it an e4m3 scale for each block: NVIDIA 2025,
  arXiv:2509.25149, appendix B; a scale rounded down saturates the largest values too;
- delayed: the amax of float32 scales is the largest of earlier steps, and larger numbers saturate. Before there is
  one (0) the scale is 1. Source: Transformer Engine 2.x, recipe DelayedScaling; Micikevicius et al. 2022,
  arXiv:2209.05433; FP8-LM, Peng et al. 2023, arXiv:2310.18313.
Stochastic rounding is unbiased only where nothing saturates: with it these two round their scales up (Tseng et al.
2025, arXiv:2502.20586, §3.1, on the bias that saturation has in MXFP4).
The scale of a group with a NaN or an infinity is NaN, and so is every output that depends on it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul.formats import E4M3, Element, Operand, Pair, values_of
from pallas_kernels.quantized_matmul.rounding import Noise, bits_of, exponent_of, power_of_two, rounded

LEAST = 2.0**-100  # of an amax: a group of smaller numbers, or of zeros, gets the scale of this one
EXACT_SUM = 2**31 - 1  # the largest sum of an int32 accumulator


class Quantized(NamedTuple):
  """`values` f32, in a float32-scaled format those of the element; in blocks already times their block's scale.

  x is about values * scale. `scale` f32 has the dims of x, 1 where it is shared; with blocks only what all share.
  """

  values: Array
  scale: Array


def quantize(
  x: Array, axes: Sequence[int], operand: Operand, noise: Noise | None = None, amax: Array | None = None
) -> Quantized:
  """`x` quantized for a product that sums over `axes`; blocks lie along the last of them. `amax` is a scalar for
  delayed scales; without one, scales are computed from the tensor itself.

  Raises KernelError where blocks do not divide that dim, and for stochastic rounding without `noise`.
  """
  x, axes = x.astype(jnp.float32), tuple(axis % x.ndim for axis in axes)
  random = _random(x, operand, noise)
  if operand.scale != 'block':
    now = largest_size(x, axes if operand.scale == 'channel' else tuple(range(x.ndim)))
    delayed = operand.scale == 'delayed' and amax is not None
    up, scale = delayed_scales(amax, now, operand.element) if delayed else float_scales(now, operand.element)
    return Quantized(rounded(x * up, operand.element, random), scale)
  axis, block = axes[-1], operand.block
  _check_blocks(x, axis, operand)
  split = lambda x: x.reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
  up, down, whole = block_scales(largest_size(split(x), (axis + 1,)), operand)
  codes = rounded(split(x) * up, operand.element, None if random is None else split(random))
  return Quantized((codes * down).reshape(x.shape), jnp.broadcast_to(whole, (1,) * x.ndim))


def largest_size(x: Array, axes: tuple[int, ...]) -> Array:
  """The largest size along `axes`, or NaN where there is one: as integers, because a maximum of floats may drop it."""
  bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axes, keepdims=True), jnp.float32)


def _random(x: Array, operand: Operand, noise: Noise | None) -> Array | None:
  if operand.rounding == 'nearest':
    return None
  return bits_of(given(noise), x.shape[-1])


def given(noise: Noise | None) -> Noise:
  """Returns `noise`. Raises KernelError if it is None."""
  if noise is None:
    raise KernelError("quantized_matmul rounds stochastically and has no seed; pass `seed`, or rounding='nearest'.")
  return noise


def _check_blocks(x: Array, axis: int, operand: Operand) -> None:
  if x.shape[axis] % operand.block:
    raise KernelError(
      f'quantized_matmul sums over {x.shape[axis]} numbers, which blocks of {operand.block} ({operand.format}) do not '
      'divide; pad them, or use another format.'
    )


def finite(amax: Array) -> Array:
  """NaN in the place of an infinity, so that no product hides it: inf * 0 would be NaN, and inf * 1 not."""
  return jnp.where(jnp.isfinite(amax), amax, jnp.nan)


def float_scales(amax: Array, element: Element) -> tuple[Array, Array]:
  """(what x is multiplied with, the scale of the codes)."""
  amax = jnp.where(amax < LEAST, LEAST, finite(amax))
  return jnp.float32(element.largest) / amax, amax / jnp.float32(element.largest)


def delayed_scales(amax: Array, now: Array, element: Element) -> tuple[Array, Array]:
  """`float_scales` of `amax`, 1 where it is 0. What x is multiplied with does not wait for its own largest size `now`,
  which is in the scale only where it is not finite: a NaN or an infinity does not hide in saturation.
  """
  up, scale = float_scales(amax.reshape(now.shape), element)
  empty = amax.reshape(now.shape) == 0
  return jnp.where(empty, 1.0, up), jnp.where(empty, 1.0, scale) * poisoned(now)


def block_scales(amax: Array, operand: Operand) -> tuple[Array, Array, Array]:
  """(what each block is multiplied with, the scale of its codes, the scale that all blocks share)."""
  element, one = operand.element, jnp.ones((), jnp.float32)
  match operand.scales:
    case 'float32':
      return *float_scales(amax, element), one
    case 'e8m0':
      exponent = shared_exponent(amax, operand)
      return power_of_two(-exponent), power_of_two(exponent) * poisoned(amax), one
    case 'two_level':
      up, whole = float_scales(largest_size(amax, tuple(range(amax.ndim))).reshape(()), E4M3)
      goal = amax * up  # at most 448, and the codes go to 6
      # Rounding with random bits of 0 is rounding up.
      own = rounded(goal, E4M3, jnp.zeros_like(goal, jnp.uint32) if operand.is_random else None)
      # A block so small that its scale is 0 has codes 0.
      return jnp.where(own > 0, up * element.largest / own, 0.0), own * poisoned(whole), whole / element.largest


def poisoned(x: Array) -> Array:
  """1, or NaN where `x` is not finite."""
  return jnp.where(jnp.isfinite(x), jnp.ones((), jnp.float32), jnp.nan)


def shared_exponent(amax: Array, operand: Operand) -> Array:
  """int32: of an e8m0 scale. Its code 0, 2 ** -127, is not used: arithmetic treats such numbers as 0."""
  largest = int(np.floor(np.log2(operand.element.largest)))
  found = jnp.clip(exponent_of(amax) - largest, -126, 125)
  if not operand.is_random:
    return found
  return found + (amax * power_of_two(-found) > operand.element.largest).astype(jnp.int32)


class Encoded(NamedTuple):
  """A matrix as it is stored: a code for each number, a code of each block's scale, and the scale of all blocks."""

  codes: Array  # uint8, in the low bits
  scales: Array  # uint8: e8m0 or e4m3
  whole: Array  # f32


def encode(x: Array, axis: int, operand: Operand) -> Encoded:
  """The published layout of mx and nvfp4: blocks along `axis`, which has a dim for blocks and one inside them."""
  axis, block = axis % x.ndim, operand.block
  _check_blocks(x, axis, operand)
  x = x.astype(jnp.float32).reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
  amax = largest_size(x, (axis + 1,))
  up, down, whole = block_scales(amax, operand)
  codes = to_codes(rounded(x * up, operand.element), operand.element)
  if operand.scales == 'two_level':
    return Encoded(codes, to_codes(down, E4M3), whole)
  scales = jnp.where(jnp.isnan(down), 255, exponent_of(down) + 127).astype(jnp.uint8)
  return Encoded(codes, scales, whole)


def decode(encoded: Encoded, axis: int, operand: Operand) -> Array:
  """f32: what `encode` stored."""
  codes = from_codes(encoded.codes, operand.element)
  scales = from_codes(encoded.scales, E4M3) if operand.scales == 'two_level' else from_e8m0(encoded.scales)
  x, axis = codes * scales * encoded.whole, axis % (codes.ndim - 1)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def to_codes(values: Array, element: Element) -> Array:
  """uint8: the code of each value of `element`, NaN's largest for NaN."""
  if element.mantissa is None:
    return values.astype(jnp.int8).astype(jnp.uint8) & jnp.uint8(2**element.bits - 1)
  size, steps = jnp.abs(values), 2**element.mantissa
  exponent = jnp.maximum(exponent_of(size), element.smallest_exponent)
  fraction = (size * power_of_two(element.mantissa - jnp.minimum(exponent, 64))).astype(jnp.int32)
  body = (exponent - element.smallest_exponent) * steps + fraction
  body = jnp.where(jnp.isnan(values), 2 ** (element.bits - 1) - 1, body)
  return (body | jnp.where(jnp.signbit(values), 2 ** (element.bits - 1), 0)).astype(jnp.uint8)


def from_codes(codes: Array, element: Element) -> Array:
  """f32: the value of each code."""
  return jnp.asarray(values_of(element), jnp.float32)[codes]


def from_e8m0(codes: Array) -> Array:
  """f32: 2 ** (code - 127); 255 is NaN. OCP MX 1.0, §5.4.1."""
  bits = jnp.where(codes == 0, 1 << 22, codes.astype(jnp.int32) << 23)
  return jnp.where(codes == 255, jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))


# (array, noise), with delayed scales also the amax of earlier steps.
Side = tuple[Array, Noise | None] | tuple[Array, Noise | None, Array]


def both(a: Side, b: Side, pair: Pair, dims) -> tuple[Quantized, Quantized]:
  (x, *x_rest), (y, *y_rest) = a, b
  return quantize(x, dims[0], pair[0], *x_rest), quantize(y, dims[1], pair[1], *y_rest)


def product(a: Side, b: Side, pair: Pair, dims) -> Array:
  """f32: the sum of products over `dims` = (axes of a, axes of b) of two (array, noise), which are quantized before.
  Integers are summed in int32, exactly.
  """
  a, b = both(a, b, pair, dims)
  if all(operand.element.is_integer and operand.in_hardware for operand in pair):
    whole = lambda x: x.values.astype(jnp.int32)
    total = integer_sum(whole(a), whole(b), pair, dims)
  else:
    options = {'precision': jax.lax.Precision.HIGHEST, 'preferred_element_type': jnp.float32}
    total = jax.lax.dot_general(a.values, b.values, (dims, ((), ())), **options)
  return scaled(total, a.scale, b.scale, dims)


def integer_sum(a: Array, b: Array, pair: Pair, dims) -> Array:
  """f32: the product of integers. Sums too long for an int32 are divided over their longest axis, and added in f32."""
  longest = EXACT_SUM // int(pair[0].element.largest * pair[1].element.largest)
  sizes = [a.shape[axis] for axis in dims[0]]
  count, first, place = int(np.prod(sizes)), max(sizes), int(np.argmax(sizes))
  dot = lambda a, b: jax.lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.int32).astype(jnp.float32)
  if count <= longest:
    return dot(a, b)
  parts = next(n for n in range(2, first + 1) if first % n == 0 and count // n <= longest)
  # Strided: each part lies on every device that has some of the axis.
  split = lambda x, axis: jnp.moveaxis(
    x.reshape(*x.shape[:axis], first // parts, parts, *x.shape[axis + 1 :]), axis + 1, 0
  )
  arrays = split(a, dims[0][place]), split(b, dims[1][place])
  zero = jnp.zeros(jax.eval_shape(dot, arrays[0][0], arrays[1][0]).shape, jnp.float32)
  return jax.lax.scan(lambda total, own: (total + dot(*own), None), zero, arrays)[0]


def scaled(total: Array, a: Array, b: Array, dims) -> Array:
  """`total` times both scales, which have the dims of the two matrices."""
  left, right = jnp.squeeze(a, dims[0]), jnp.squeeze(b, dims[1])
  return total * left.reshape(*left.shape, *(1,) * right.ndim) * right
