"""The product on TPU as a Mosaic kernel: codes in, or numbers that it quantizes, with scales that it is given.

Codes that the kernel makes never go back to memory: those of the first matrix are made once for a block of rows, and
stay in fast memory while all blocks of the second one pass. The interpreter runs the same kernel.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul import blocks
from pallas_kernels.quantized_matmul.blocks import LANES, Blocks, Shape
from pallas_kernels.quantized_matmul.formats import Element, Operand
from pallas_kernels.quantized_matmul.rounding import mix, nearest, rounded

AT_ONCE = 64  # rows that are rounded at a time
COLUMNS = 512  # of the second matrix, that are multiplied at a time


class Matrix(NamedTuple):
  """A matrix as it is stored: x[rows, columns], or x[batch, heads, length, head_dim] with rows (batch, length) and
  columns (heads, head_dim). `summed` is the dim of the matrix that the product sums over.

  `up`: what its numbers are multiplied with before they are rounded, f32[rows, 1] or f32[1, columns]; None: they are
  multiplied as they are. `hashes` uint32[rows, 1] and `columns` uint32[1, columns] make the random bits. `scale`, with
  the dims of `up`: what the sums are multiplied with; None in both matrices: sums are returned as they are.
  """

  x: Array
  summed: int
  up: Array | None = None
  hashes: Array | None = None
  columns: Array | None = None
  scale: Array | None = None

  @property
  def shape(self) -> tuple[int, int]:
    if self.x.ndim == 2:
      return self.x.shape
    batch, heads, length, dim = self.x.shape
    return batch * length, heads * dim


@dataclasses.dataclass(frozen=True)
class Side:
  """What the kernel knows of a matrix. `block`: the shape of its tiles; `place` (0 or 1): the first or second matrix,
  and the grid's dim of what is not summed over; `held`: the dtype in which it is multiplied; `heads`: the shape of an
  array of heads; `kept`: the number of steps whose codes stay.
  """

  operand: Operand | None
  summed: int
  block: tuple[int, int]
  place: int
  held: Any
  heads: tuple[int, ...] | None = None
  kept: int = 0

  @property
  def is_random(self) -> bool:
    return self.operand is not None and self.operand.is_random

  @property
  def is_copied(self) -> bool:
    """Whether the product reads codes that the kernel has written."""
    return self.operand is not None or self.heads is not None

  @property
  def is_turned(self) -> bool:
    """Whether codes are kept with rows and columns exchanged: once for all products, which need the sum's dim last."""
    return self.kept > 0 and self.summed == 0 and self.block[0] % LANES == self.block[1] % LANES == 0

  @property
  def turns(self) -> int:
    """How often a loop makes codes of some rows, to make those of a tile."""
    most = LANES if self.is_turned else AT_ONCE
    length = min(self.block[0], self.heads[2]) if self.heads else self.block[0]
    return self.block[0] // (most if length % most == 0 else length)

  @property
  def summed_in_product(self) -> int:
    return 1 if self.is_turned else self.summed

  def at(self, step) -> tuple[Any, Any]:
    """The row and column of the tile at step (i, j, k). Numbers whose codes are kept are read for the first j alone."""
    summed = jnp.where(step[1] == 0, step[2], self.kept - 1) if self.kept > 1 else step[2]
    return (summed, step[self.place]) if self.summed == 0 else (step[self.place], summed)

  def spec(self) -> pl.BlockSpec:
    return _spec(self.block, self.heads, self.at)

  def rows_spec(self) -> pl.BlockSpec:
    return pl.BlockSpec((self.block[0], 1), lambda *step: (self.at(step)[0], 0))

  def columns_spec(self) -> pl.BlockSpec:
    return pl.BlockSpec((1, self.block[1]), lambda *step: (0, self.at(step)[1]))

  def scratch(self) -> list[Any]:
    block = self.block[::-1] if self.is_turned else self.block
    return [pltpu.VMEM((max(self.kept, 1), *block), self.held)] if self.is_copied else []


def _spec(block: tuple[int, int], heads: tuple[int, ...] | None, at) -> pl.BlockSpec:
  """The tile at row and column at(step) of a matrix, or of the array of heads that stands for it."""
  if heads is None:
    return pl.BlockSpec(block, lambda *step: at(step))
  _, _, length, dim = heads
  per = max(length // block[0], 1)  # blocks of rows in a row of the batch

  def place(*step):
    row, column = at(step)
    return row // per, column, row % per, 0

  return pl.BlockSpec((max(block[0] // length, 1), block[1] // dim, min(block[0], length), dim), place)


def shape_of(a: Matrix, b: Matrix, out_heads: tuple[int, ...] | None, out_bytes: int) -> Shape:
  """The product, as `blocks.choose` takes it. Reads shapes and dtypes of arrays alone."""
  (m, k), n = (a.shape if a.summed else a.shape[::-1]), b.shape[1 - b.summed]
  rows, columns = {'m': [], 'k': [], 'n': []}, {'m': [], 'k': [], 'n': []}
  for x, names in ((a, 'mk' if a.summed else 'km'), (b, 'nk' if b.summed else 'kn')):
    if x.x.ndim == 4:
      rows[names[0]].append(x.x.shape[2])
      columns[names[1]].append(x.x.shape[3])
  if out_heads is not None:
    rows['m'].append(out_heads[2])
    columns['n'].append(out_heads[3])
  frozen = lambda of: tuple(tuple(of[name]) for name in 'mkn')
  size = lambda x: x.x.dtype.itemsize
  kept, copied = (x.up is not None or x.x.ndim == 4 for x in (a, b))
  return Shape(m, k, n, size(a), size(b), out_bytes, kept, copied, frozen(rows), frozen(columns))


@dataclasses.dataclass(frozen=True)
class Call:
  """One run of the kernel: its product, its tiles, and what it knows of both matrices. `total`: the dtype of sums,
  `dtype` that of the result; `out_heads` as in `matmul`.
  """

  of: Shape
  tiles: Blocks
  sides: tuple[Side, Side]
  is_raw: bool
  total: Any
  dtype: Any
  out_heads: tuple[int, ...] | None

  @property
  def grid(self) -> tuple[int, int, int]:
    return self.tiles.grid(self.of)

  @property
  def turns(self) -> int:
    """How often a loop multiplies with some columns of a tile of the second matrix, to do so with all."""
    heads = [] if self.out_heads is None else [self.out_heads[3]]
    fits = self.tiles.n % COLUMNS == 0 and all(COLUMNS % dim == 0 for dim in heads)
    return self.tiles.n // COLUMNS if fits else 1

  @property
  def scratch(self) -> list[Any]:
    sums = [pltpu.VMEM((self.tiles.m, self.tiles.n), self.total)] if self.grid[2] > 1 else []
    return [*self.sides[0].scratch(), *self.sides[1].scratch(), *sums]

  def run(self, arrays: list[Array], specs: list[pl.BlockSpec], interpret: Any) -> Array:
    shape = (self.of.m, self.of.n) if self.out_heads is None else self.out_heads
    order = 'arbitrary' if self.sides[0].kept else 'parallel'
    return pl.pallas_call(
      functools.partial(_kernel, self), name='quantized_matmul', interpret=interpret, grid=self.grid,
      out_shape=jax.ShapeDtypeStruct(shape, self.dtype), in_specs=specs, scratch_shapes=self.scratch,
      out_specs=_spec((self.tiles.m, self.tiles.n), self.out_heads, lambda step: step[:2]),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', order, 'arbitrary'), vmem_limit_bytes=blocks.chip_in_use().limit
      ),
    )(*arrays)  # fmt: skip


def matmul(
  a: Matrix, b: Matrix, pair: tuple[Operand | None, Operand | None], *, dtype: Any = jnp.float32,
  out_heads: tuple[int, ...] | None = None, interpret: Any = False,
) -> Array:  # fmt: skip
  """[M, N] in `dtype`, or with `out_heads` an array of heads of that shape: the product of both, which are quantized
  where they have an `up`, by their `Operand`. Without scales: the sums, in int32 or float32; of matrices that are not
  quantized (`pair` has no Operand) in `dtype`. Raises KernelError where no tiles fit into the chip's VMEM.
  """
  total = jnp.int32 if _held(a, pair[0]) == jnp.int8 else jnp.float32
  is_raw = a.scale is None
  dtype = total if is_raw and pair != (None, None) else dtype
  of = shape_of(a, b, out_heads, jnp.dtype(dtype).itemsize)
  tiles = blocks.choose(of, blocks.chip_in_use(), [operand.format for operand in pair if operand is not None])
  sides, arrays, specs = [], [], []
  for x, operand, place, own in ((a, pair[0], 0, tiles.m), (b, pair[1], 1, tiles.n)):
    side = _side(x, operand, place, (own, tiles.k), tiles.grid(of)[2])
    given = _given(x, side)
    if not is_raw:
      at = (lambda i, j, k: (i, 0)) if place == 0 else (lambda i, j, k: (0, j))
      size = (own, 1) if place == 0 else (1, own)
      given.append((x.scale.reshape((-1, 1) if place == 0 else (1, -1)), pl.BlockSpec(size, at)))
    sides.append(side)
    arrays += [array for array, _ in given]
    specs += [spec for _, spec in given]
  return Call(of, tiles, tuple(sides), is_raw, total, dtype, out_heads).run(arrays, specs, interpret)


def _side(x: Matrix, operand: Operand | None, place: int, sizes: tuple[int, int], steps: int) -> Side:
  """`sizes` of a tile: along what is not summed over, and along what is."""
  block = sizes if x.summed == 1 else sizes[::-1]
  heads = x.x.shape if x.x.ndim == 4 else None
  side = Side(operand if x.up is not None else None, x.summed, block, place, _held(x, operand), heads)
  return dataclasses.replace(side, kept=steps) if place == 0 and side.is_copied else side


def _given(x: Matrix, side: Side) -> list[tuple[Any, pl.BlockSpec]]:
  """The arrays of a side with their tiles, in the order of `_kernel`."""
  found = [(x.x, side.spec())]
  if side.operand is not None:
    found.append((x.up, side.columns_spec() if x.summed == 0 else side.rows_spec()))
  if side.is_random:
    found += [(x.hashes, side.rows_spec()), (x.columns, side.columns_spec())]
  return found


def _held(x: Matrix, operand: Operand | None):
  """The dtype in which the product takes the matrix."""
  if x.up is None or operand is None:
    return x.x.dtype
  return jnp.int8 if operand.element.is_integer else operand.element.dtype


def _kernel(call: Call, *refs):
  """One step: both tiles to codes where they are not, their product into the sum; the last step writes it."""
  refs, given, sides, steps = list(refs), [], call.sides, call.grid[2]
  for side in sides:
    own = {'tile': refs.pop(0)}
    own |= {'up': refs.pop(0)} if side.operand else {}
    own |= {'hashes': refs.pop(0), 'columns': refs.pop(0)} if side.is_random else {}
    given.append((own, None if call.is_raw else refs.pop(0)))
  out = refs.pop(0)
  step, codes = pl.program_id(2), []
  for side, (own, _) in zip(sides, given, strict=True):
    if not side.is_copied:
      codes.append(own['tile'])
      continue
    held = refs.pop(0)
    at = step if side.kept else 0
    fill = functools.partial(_fill, side, held, at, **own)
    pl.when(pl.program_id(1) == 0)(fill) if side.kept else fill()
    codes.append(held.at[at])
  sums = refs.pop(0) if steps > 1 else None
  write = functools.partial(_write, call, out, [scale for _, scale in given])

  def some(turn, _):
    """The product with some columns of the second matrix: short code, which compiles in a fraction of the time."""
    size = call.tiles.n // call.turns
    columns = pl.ds(pl.multiple_of(turn * size, size), size)
    second = codes[1][:, columns] if sides[1].summed == 0 else codes[1][columns, :]
    dims = (((sides[0].summed_in_product,), (sides[1].summed,)), ((), ()))
    found = jax.lax.dot_general(codes[0][...], second, dims, preferred_element_type=call.total)
    if sums is None:
      write(found, turn, columns)
      return _

    @pl.when(step == 0)
    def _first():
      sums[:, columns] = found

    @pl.when(step > 0)
    def _later():
      sums[:, columns] += found

    pl.when(step == steps - 1)(lambda: write(sums[:, columns], turn, columns))
    return _

  jax.lax.fori_loop(0, call.turns, some, 0)


def _write(call: Call, out, scales, found: Array, turn, columns) -> None:
  """Sums with their scales to some columns of the result."""
  if not call.is_raw:
    found = found.astype(jnp.float32) * scales[0][...] * scales[1][:, columns]
  found = found.astype(out.dtype)
  if call.out_heads is None:
    out[:, columns] = found
    return
  batch, _, length, dim = out.shape
  count = found.shape[1] // dim
  for row in range(batch):
    for head in range(count):
      part = found[row * length : (row + 1) * length, head * dim : (head + 1) * dim]
      out[row, turn * count + head] = part


def _code(x: Array, element: Element, random: Array | None) -> Array:
  """float32 or int32: `x` as a value of `element`. To the nearest integer nothing saturates, because the largest number
  of a channel has the largest code."""
  if random is None and not element.is_integer:
    return nearest(x, element)
  nearby = jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN) if random is None else rounded(x, element, random)
  return nearby.astype(jnp.int32) if element.is_integer else nearby


def _wide(x: Array) -> Array:
  """Numbers of 32 bits, of which the chip exchanges rows and columns."""
  if x.dtype.itemsize == 4:
    return x
  return x.astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)


def _fill(side: Side, held, at, *, tile, up=None, hashes=None, columns=None) -> None:
  """Writes the codes of a tile to held[at], some rows at a time."""
  _, pieces, length, width = tile.shape if side.heads else (1, 1, *tile.shape)
  if side.is_random and not side.heads and width % LANES == 0:  # what a number's bits take stays in registers
    pieces, width = width // LANES, LANES
  size = side.block[0] // side.turns
  per = length // size

  def some(turn, _):
    row, place = turn // per, turn % per
    inside, rows = pl.ds(pl.multiple_of(place * size, size), size), pl.ds(pl.multiple_of(turn * size, size), size)
    for piece in range(pieces):
      own = slice(piece * width, (piece + 1) * width)
      x = tile[row, piece, inside, :] if side.heads else tile[inside, own]
      if side.operand is not None:
        of_channel = up[:, own] if side.summed == 0 else up[rows, :]
        random = mix(hashes[rows, :] ^ columns[:, own]) if side.is_random else None
        x = _code(x.astype(jnp.float32) * of_channel, side.operand.element, random)
      if side.is_turned:
        held[at, own, rows] = _wide(x).T.astype(side.held)
      else:
        held[at, rows, own] = x.astype(side.held)
    return _

  jax.lax.fori_loop(0, side.turns, some, 0)
