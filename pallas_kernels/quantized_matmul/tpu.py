"""The product on TPU as a Mosaic kernel that quantizes inside: tiles come as they are, codes never go back to memory.

There is one scale for each tensor or channel, computed before the kernel runs. The interpreter runs the same kernel.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul.formats import Operand, Pair
from pallas_kernels.quantized_matmul.reference import EXACT_SUM, float_scales, largest_size
from pallas_kernels.quantized_matmul.rounding import Noise, bits, nearest, nearest_code, rounded, row_hashes

LANES = 128
BLOCKS = (1024, 512, 256, 128)
VMEM = 64 * 2**20  # bytes that the kernel may use of a core's fast memory
KEPT = 8 * 2**20  # bytes of codes of the first matrix that are kept while all blocks of the second pass


@dataclasses.dataclass(frozen=True)
class Side:
  """A matrix as it is stored, and which of its dims is summed over (0 or 1). `block` is the shape of its tiles.

  `operand` None: its numbers are multiplied as they are.
  """

  operand: Operand | None
  summed: int
  block: tuple[int, int]

  @property
  def is_random(self) -> bool:
    return self.operand is not None and self.operand.is_random

  @property
  def held(self):
    """The dtype of codes in a product."""
    return jnp.int8 if self.operand.element.is_integer else self.operand.element.dtype

  def spec(self, kept: int) -> pl.BlockSpec:
    """The tile at step (i, j, k); `kept` is the grid's dim of the rows or columns that are not summed over."""
    return pl.BlockSpec(self.block, lambda *step: (step[2], step[kept]) if self.summed == 0 else (step[kept], step[2]))

  def scales_spec(self, kept: int) -> pl.BlockSpec:
    """The numbers of the tile's channels: one for each row or column that is not summed over."""
    if self.summed == 0:
      return pl.BlockSpec((1, self.block[1]), lambda *step: (0, step[kept]))
    return pl.BlockSpec((self.block[0], 1), lambda *step: (step[kept], 0))

  def rows_spec(self, kept: int) -> pl.BlockSpec:
    return pl.BlockSpec((self.block[0], 1), lambda *step: (step[2] if self.summed == 0 else step[kept], 0))

  def first_column(self, kept: int, step):
    """The index in the matrix of the first column of the tile at step (i, j, k)."""
    return step[2 if self.summed == 1 else kept] * self.block[1]


def block_of(size: int) -> int:
  """The largest of `BLOCKS` that divides `size`, or all of it."""
  return next((block for block in BLOCKS if size % block == 0), size)


def product(a: Any, b: Any, pair: Pair, dims, *, interpret: Any = False) -> Array:
  """`reference.product` of two (array, noise), each quantized in the kernel, in the dtype of the first.

  Raises KernelError for formats with a scale for each block, and for sums that an int32 may not hold.
  """
  _check(a[0], pair, dims)
  flat = [_flat(*side, own) for side, own in zip((a, b), dims, strict=True)]
  outer = [
    tuple(n for axis, n in enumerate(x.shape) if axis not in own) for (x, _), own in zip((a, b), dims, strict=True)
  ]
  found = matmul(*flat, pair, dtype=a[0].dtype, interpret=interpret)
  return found.reshape(*outer[0], *outer[1])


def fits(a: Array, pair: Pair, dims) -> bool:
  """Whether the kernel has this product, on one device."""
  try:
    _check(a, pair, dims)
  except KernelError:
    return False
  return all(operand.scale != 'delayed' for operand in pair)


def _check(a: Array, pair: Pair, dims) -> None:
  blocked = [operand.format for operand in pair if not operand.in_hardware]
  kinds = {operand.element.is_integer for operand in pair}
  if blocked or len(kinds) > 1:
    raise KernelError(
      f"kernels.quantized_matmul='tpu' has no {' and '.join(blocked) or 'products of integers and fp8'}; it has int8, "
      "int4 and fp8 with scales of tensors or channels. Use 'auto' or 'xla'."
    )
  count = math.prod(a.shape[axis] for axis in dims[0])
  if kinds == {True} and count > EXACT_SUM // int(pair[0].element.largest * pair[1].element.largest):
    raise KernelError(
      f"kernels.quantized_matmul='tpu' sums {count} products of {pair[0].format} in an int32, which may overflow; use "
      "'auto' or 'xla', or smaller batches."
    )


def _flat(x: Array, noise: Noise | None, axes: tuple[int, ...]):
  """(x as a matrix, its noise, the dim that is summed over). The dims that go with the first one are its rows."""
  others = tuple(axis for axis in range(x.ndim) if axis not in axes)
  first, last = (axes, others) if 0 in axes else (others, axes)
  rows = math.prod(x.shape[axis] for axis in first)
  own = None if noise is None else Noise(noise.seed, _row_numbers(x, noise, first))
  return jnp.transpose(x, (*first, *last)).reshape(rows, -1), own, 0 if first == axes else 1


def _row_numbers(x: Array, noise: Noise, first: tuple[int, ...]) -> Array:
  """uint32[rows]: those of `noise`, for the dims `first` of x."""
  if noise.columns is None:
    return jnp.broadcast_to(noise.rows, x.shape[:-1]).reshape(-1)
  kept = tuple(n if axis in first else 1 for axis, n in enumerate(x.shape))
  return jnp.broadcast_to(noise.rows, kept).reshape(-1)


def matmul(a, b, pair: tuple[Operand | None, Operand | None], *, dtype=jnp.float32, interpret: Any = False) -> Array:
  """[M, N] in `dtype`: the product of two (matrix, noise, summed dim); without an `Operand` one is taken as it is."""
  sides, arrays, specs = [], [], []
  for (x, noise, summed), operand, kept in zip((a, b), pair, (0, 1), strict=True):
    side = Side(operand, summed, (block_of(x.shape[0]), block_of(x.shape[1])))
    up, scale = scales_of(x, side)
    sides.append(side)
    arrays += [x, up] + ([row_hashes(noise)[:, None]] if side.is_random else [])
    specs += [side.spec(kept), side.scales_spec(kept)] + ([side.rows_spec(kept)] if side.is_random else [])
    scale = scale.reshape((-1, 1) if kept == 0 else (1, -1))
    arrays.append(scale)
    size = (side.block[1 - summed], 1) if kept == 0 else (1, side.block[1 - summed])
    specs.append(pl.BlockSpec(size, (lambda i, j, k: (i, 0)) if kept == 0 else (lambda i, j, k: (0, j))))
  m, n = a[0].shape[1 - a[2]], b[0].shape[1 - b[2]]
  block_m, block_n = (side.block[1 - side.summed] for side in sides)
  steps = a[0].shape[a[2]] // sides[0].block[a[2]]
  integer = a[0].dtype == jnp.int8 if pair[0] is None else pair[0].element.is_integer
  keeps = pair[0] is not None and steps * block_m * sides[0].block[a[2]] <= KEPT and n > block_n
  cache = [pltpu.VMEM((steps, *sides[0].block), sides[0].held)] if keeps else []
  return pl.pallas_call(
    functools.partial(_kernel, tuple(sides), steps, keeps),
    name='quantized_matmul', interpret=interpret, out_shape=jax.ShapeDtypeStruct((m, n), dtype),
    grid=(m // block_m, n // block_n, steps), in_specs=specs,
    out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, k: (i, j)),
    scratch_shapes=[*cache, pltpu.VMEM((block_m, block_n), jnp.int32 if integer else jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary' if keeps else 'parallel', 'arbitrary'), vmem_limit_bytes=VMEM
    ),
  )(*arrays)  # fmt: skip


def scales_of(x: Array, side: Side) -> tuple[Array, Array]:
  """(what x is multiplied with, the scale of its codes): one for each channel, equal ones for a tensor's."""
  shape = tuple(1 if axis == side.summed else n for axis, n in enumerate(x.shape))
  if side.operand is None:
    return jnp.ones(shape, jnp.float32), jnp.ones(shape, jnp.float32)
  own = (side.summed,) if side.operand.scale == 'channel' else (0, 1)
  found = float_scales(largest_size(x.astype(jnp.float32), own), side.operand.element)
  return tuple(jnp.broadcast_to(each, shape) for each in found)


def _kernel(sides: tuple[Side, Side], steps: int, keeps: bool, *refs):
  """One step: both tiles to codes, their product into the accumulator; the last step writes the scaled sum.

  With `keeps` the codes of the first matrix are made once for a block of rows, and read for each block of columns.
  """
  refs, total = list(refs[:-1]), refs[-1]
  cache, out = refs.pop() if keeps else None, refs.pop()

  make, scales, place = [], [], [pl.program_id(axis) for axis in range(3)]
  for kept, side in enumerate(sides):
    tile, up = refs.pop(0), refs.pop(0)
    hashes = refs.pop(0) if side.is_random else None
    scales.append(refs.pop(0))
    make.append(functools.partial(_codes, side, side.first_column(kept, place), tile, up, hashes))
  step = place[2]

  @pl.when(step == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  if keeps:

    @pl.when(place[1] == 0)
    def _():
      cache[step] = make[0]()

  codes = cache[step] if keeps else make[0](), make[1]()
  dims = (((sides[0].summed,), (sides[1].summed,)), ((), ()))
  total[...] += jax.lax.dot_general(*codes, dims, preferred_element_type=total.dtype)

  @pl.when(step == steps - 1)
  def _():
    out[...] = (total[...].astype(jnp.float32) * scales[0][...] * scales[1][...]).astype(out.dtype)


def _codes(side: Side, column, tile, up, hashes) -> Array:
  if side.operand is None:
    return tile[...]
  element = side.operand.element
  x = tile[...].astype(jnp.float32) * up[...]
  if hashes is None:
    return nearest_code(x, element) if element.is_integer else nearest(x, element).astype(side.held)
  columns = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + column
  found = rounded(x, element, bits(hashes[...], columns.astype(jnp.uint32)))
  return (found.astype(jnp.int32) if element.is_integer else found).astype(side.held)
