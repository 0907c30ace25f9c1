"""XLA's own product of low-precision numbers: codes go into the dot, which runs on them where the chip can."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized_matmul.formats import Operand, Pair
from pallas_kernels.quantized_matmul.reference import Side, both, integer_sum, scaled


def product(a: Side, b: Side, pair: Pair, dims) -> Array:
  """`reference.product`; formats in blocks are multiplied in bfloat16, which holds their numbers exactly."""
  left, right = pair
  a, b = both(a, b, pair, dims)
  if left.in_hardware and right.in_hardware and left.element.is_integer == right.element.is_integer:
    a_codes, b_codes = (x.values.astype(_held(operand)) for x, operand in zip((a, b), pair, strict=True))
    if left.element.is_integer:
      return scaled(integer_sum(a_codes, b_codes, pair, dims), a.scale, b.scale, dims)
  else:
    wide = jnp.promote_types(_wide(left), _wide(right))
    a_codes, b_codes = a.values.astype(wide), b.values.astype(wide)
  precision = jax.lax.Precision.HIGHEST if a_codes.dtype == jnp.float32 else None
  options = {'precision': precision, 'preferred_element_type': jnp.float32}
  return scaled(jax.lax.dot_general(a_codes, b_codes, (dims, ((), ())), **options), a.scale, b.scale, dims)


def _held(operand: Operand):
  """Four bits in eight: XLA has no products of int4 on a CPU or GPU."""
  return jnp.int8 if operand.element.is_integer else operand.element.dtype


def _wide(operand: Operand):
  """A dtype in which all quantized numbers of `operand` are exact."""
  return jnp.bfloat16 if operand.in_hardware else operand.carrier
