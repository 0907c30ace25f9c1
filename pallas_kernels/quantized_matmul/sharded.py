"""The kernel's product of whole arrays on a mesh: scales and random bits are those of one device, tiles are its own.

Scales come from whole arrays, before arrays are divided. A sum over a divided dim is the sum of what each device finds:
of integers it is exact, so that a mesh gives what one device does.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import blocks, tpu
from pallas_kernels.quantized_matmul.formats import Operand, Pair
from pallas_kernels.quantized_matmul.reference import EXACT_SUM, float_scales, given, largest_size
from pallas_kernels.quantized_matmul.rounding import COLUMN, Noise, mix, rounded, row_hashes

Entries = tuple[tuple[str, ...], ...]  # for each dim the mesh axes that divide it


@dataclasses.dataclass(frozen=True)
class Division:
  """How the mesh divides the arrays of a product x w: for each dim the names of mesh axes, () where it is whole.

  `stored`: how w is kept; it is divided further there than in the product, which gathers it as codes.
  """

  x: Entries
  w: Entries
  stored: Entries

  def of_gradient(self, axes: tuple[int, ...]) -> Entries:
    """That of the gradient of the product, which sums over the dims `axes` of x."""
    return tuple(own for axis, own in enumerate(self.x) if axis not in axes) + self.w[len(axes) :]


class Given(NamedTuple):
  """An array of a product, whole or one device's part of it; all other fields have its dims, of size 1 where shared.

  `x` are codes where `up` is None. `hashes` uint32 of rows and `columns` of columns make random bits.
  """

  x: Array
  up: Array | None
  scale: Array
  hashes: Array | None = None
  columns: Array | None = None


class Parts(NamedTuple):
  """Of one side of a product: how the mesh divides the array, and how it is kept where it is a weight."""

  entries: Entries
  stored: Entries | None = None


def product(
  a: Any,
  b: Any,
  pair: Pair,
  dims,
  parts: tuple[Parts, Parts] | None = None,
  *,
  dtype: Any = None,
  interpret: Any = False,
) -> Array:
  """`reference.product` of two (array, noise) by the kernel in `dtype`, by default that of the first. `parts`: how the
  mesh divides both; without it they are on one device.

  Raises KernelError for formats with a scale for each block, for sums that an int32 may not hold, where no tiles fit
  into the chip's VMEM, and on several devices without `parts`, or where these do not divide a dim.
  """
  dtype = a[0].dtype if dtype is None else dtype
  check(a[0], b[0], pair, dims, parts)
  outer = [_outer(x[0].shape, axes) for x, axes in zip((a, b), dims, strict=True)]
  shape, heads = outer[0] + outer[1], outer[1] if _is_of_heads(outer, dims) else None
  if not on_several():
    parts = None
  if parts is not None:
    b, dims, parts = _flat_weight(b, dims, parts)
  sides = [_given(*side, own, operand) for side, own, operand in zip((a, b), dims, pair, strict=True)]
  if _is_made_before(a[0], b[0], dims, parts, dtype):
    sides[1] = coded(sides[1], pair[1], None if parts is None else parts[1])
  if parts is None:
    return _on_device(pair, dims, dtype, interpret, heads, *sides).reshape(shape)
  return _on_each(sides, pair, dims, parts, dtype, interpret, heads).reshape(shape)


def on_several() -> bool:
  """Whether the mesh in use has several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1


def fits(a: Array, b: Array, pair: Pair, dims, parts: tuple[Parts, Parts] | None) -> bool:
  """Whether the kernel has this product on the mesh in use, in a's dtype, and tiles for it, and whole lanes divide a
  device's part.
  """
  try:
    check(a, b, pair, dims, parts)
  except KernelError:
    return False
  whole = all(n % blocks.LANES == 0 for n in sizes_of(a, b, dims, parts if on_several() else None))
  if not whole or any(operand.scale == 'delayed' for operand in pair):
    return False
  return blocks.fitting(shape_in_kernel(a, b, pair, dims, parts, a.dtype), blocks.chip_in_use()) is not None


def check(a: Array, b: Array, pair: Pair, dims, parts: tuple[Parts, Parts] | None) -> None:
  """Raises KernelError, with the fix, for a product that the kernel does not have on the mesh in use."""
  check_scales(pair)
  kinds = {operand.element.is_integer for operand in pair}
  if on_several():
    _check_parts((a, b), parts)
  count = math.prod(n for axis, n in enumerate(local_shape(a, parts and parts[0])) if axis in dims[0])
  if kinds == {True} and count > _longest(pair):
    raise KernelError(
      f"kernels.quantized_matmul='tpu' sums {count} products of {pair[0].format} in an int32, which may overflow; use "
      "'auto' or 'xla', or smaller batches."
    )


def check_scales(pair: Pair, implementation: str = 'tpu') -> None:
  """Raises KernelError for operands that the kernel does not multiply as codes of one kind."""
  blocked = dict.fromkeys(f'{operand.format} with scales of blocks' for operand in pair if not operand.in_hardware)
  if blocked or len({operand.element.is_integer for operand in pair}) > 1:
    raise KernelError(
      f"kernels.quantized_matmul='{implementation}' has no {' and '.join(blocked) or 'products of integers and fp8'}; "
      "it has int8, int4 and fp8 with scales of tensors or channels. Use 'auto' or 'xla'."
    )


def shape_in_kernel(
  a: Array, b: Array, pair: Pair, dims, parts: tuple[Parts, Parts] | None, dtype: Any
) -> blocks.Shape:
  """What one device's kernel is given of the product of a and b, of which it reads shapes and dtypes alone."""
  parts = parts if on_several() else None
  of_a, of_b = (local_shape(x, own) for x, own in zip((a, b), parts or (None, None), strict=True))
  outer = [_outer(shape, axes) for shape, axes in zip((of_a, of_b), dims, strict=True)]
  is_coded, is_divided = _is_made_before(a, b, dims, parts, dtype), False
  if parts is not None:
    is_divided = _size(sum((parts[0].entries[axis] for axis in dims[0]), ())) > 1
    if (groups := _groups(b.ndim, dims[1], parts[1])) is not None:
      dims, of_b = (dims[0], (groups.index(dims[1]),)), tuple(math.prod(of_b[axis] for axis in own) for own in groups)
  left = _abstract(of_a, dims[0], a.dtype, is_coded=False)
  right = _abstract(of_b, dims[1], _code_dtype(pair[1]) if is_coded else b.dtype, is_coded=is_coded)
  heads = _out_heads(outer[0], outer[1]) if _is_of_heads(outer, dims) else None
  return tpu.shape_of(left, right, heads, 4 if is_divided else jnp.dtype(dtype).itemsize)


def _check_parts(arrays, parts: tuple[Parts, Parts] | None) -> None:
  if parts is None:
    devices = jax.sharding.get_abstract_mesh().size
    raise KernelError(
      f"kernels.quantized_matmul='tpu' does not know how this mesh of {devices} devices divides a product (one in a "
      "pipeline of mesh.stage, or inside another kernel); use 'auto' or 'xla', whose products the partitioner divides."
    )
  for x, own in zip(arrays, parts, strict=True):
    for n, names in zip(x.shape, own.entries, strict=True):
      if n % _size(names):
        raise KernelError(
          f"kernels.quantized_matmul='tpu' cannot divide a dim of {n} in {x.shape} over mesh.{'*'.join(names)}="
          f"{_size(names)}; use 'auto' or 'xla', or make it a multiple of {_size(names)}."
        )


def local_shape(x: Array, own: Parts | None) -> tuple[int, ...]:
  """The shape of one device's part of x."""
  return x.shape if own is None else tuple(n // _size(names) for n, names in zip(x.shape, own.entries, strict=True))


def _size(names: tuple[str, ...]) -> int:
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(name, 1) for name in names)


def _longest(pair: Pair) -> int:
  """How many products of two codes an int32 holds for certain."""
  return EXACT_SUM // int(pair[0].element.largest * pair[1].element.largest)


def _given(x: Array, noise: Noise | None, axes: tuple[int, ...], operand: Operand) -> Given:
  """A whole array with the scales of its channels or of all, and what its random bits are made of."""
  own = axes if operand.scale == 'channel' else tuple(range(x.ndim))
  up, scale = float_scales(largest_size(x.astype(jnp.float32), own), operand.element)
  of_channel = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
  up, scale = jnp.broadcast_to(up, of_channel), jnp.broadcast_to(scale, of_channel)
  if not operand.is_random:
    return Given(x, up, scale)
  noise = given(noise)
  if noise.columns is None:
    last = jnp.arange(x.shape[-1], dtype=jnp.uint32).reshape(*(1,) * (x.ndim - 1), -1)
    noise = noise._replace(rows=noise.rows[..., None], columns=last)
  return Given(x, up, scale, row_hashes(noise), noise.columns * jnp.uint32(COLUMN))


def coded(side: Given, operand: Operand, own: Parts | None = None) -> Given:
  """The same with codes in the place of numbers, made by XLA: of a weight that is kept divided, where it is kept."""
  random = None if side.hashes is None else mix(side.hashes ^ side.columns)
  found = rounded(side.x.astype(jnp.float32) * side.up, operand.element, random)
  codes = found.astype(_code_dtype(operand))
  if own is not None and own.stored is not None:
    codes = jax.lax.with_sharding_constraint(codes, _spec(codes, own.stored))
  return Given(codes, None, side.scale)


def _code_dtype(operand: Operand) -> Any:
  return jnp.int8 if operand.element.is_integer else operand.element.dtype


def _is_made_before(a: Array, b: Array, dims, parts: tuple[Parts, Parts] | None, dtype: Any) -> bool:
  """Whether codes of the second matrix are made before the kernel: a weight's are, to be gathered as codes, and those
  that the kernel would make again for each block of rows, or has no tiles for.
  """
  if parts is not None and parts[1].stored is not None:
    return True
  m, k, n = sizes_of(a, b, dims, parts)
  bytes_of = (jnp.dtype(own).itemsize for own in (a.dtype, b.dtype, dtype))
  found = blocks.fitting(blocks.Shape(m, k, n, *bytes_of, kept=True, copied=True), blocks.chip_in_use())
  return found is None or found.m < m


def sizes_of(a: Array, b: Array, dims, parts: tuple[Parts, Parts] | None) -> tuple[int, int, int]:
  """(rows, length of the sums, columns) of one device's product."""
  of_a, of_b = (local_shape(x, own) for x, own in zip((a, b), parts or (None, None), strict=True))
  own = lambda shape, axes: math.prod(_outer(shape, axes))
  return own(of_a, dims[0]), math.prod(of_a[axis] for axis in dims[0]), own(of_b, dims[1])


def _outer(sizes: tuple, axes: tuple[int, ...]) -> tuple:
  """What `sizes`, one for each dim, has for the dims that are not `axes`."""
  return tuple(n for axis, n in enumerate(sizes) if axis not in axes)


def _flat_weight(b: Any, dims, parts: tuple[Parts, Parts]):
  """(b, dims, parts) with a weight as a matrix, so that it is gathered as one: else devices copy it after that."""
  (x, noise), own, axes = b, parts[1], dims[1]
  if (groups := _groups(x.ndim, axes, own)) is None:
    return b, dims, parts
  merge = lambda entries: tuple(entries[group[0]] for group in groups)
  size = lambda x, group: math.prod(x.shape[axis] for axis in group)
  flat = lambda x: x.reshape(*(size(x, group) for group in groups))
  noise = None if noise is None else noise._replace(rows=flat(noise.rows), columns=flat(noise.columns))
  return (
    (flat(x), noise),
    (dims[0], (groups.index(axes),)),
    (parts[0], Parts(merge(own.entries), merge(own.stored))),
  )


def _groups(ndim: int, axes: tuple[int, ...], own: Parts) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """(row dims, column dims) with which a weight becomes a matrix. None for an array that is no weight, and where a dim
  behind the first one of its group is sharded, so that reshaping would move data.
  """
  if own.stored is None:
    return None
  groups = _sides(ndim, axes)
  is_sharded = any(names[axis] for names in (own.entries, own.stored) for group in groups for axis in group[1:])
  return None if is_sharded else groups


def _on_each(sides, pair: Pair, dims, parts: tuple[Parts, Parts], dtype, interpret, heads) -> Array:
  """On each device the product of its parts, and the sum of these over the devices that divide what is summed over.

  Dims are joined to rows and columns where a device's part allows it: [rows, columns], [batch, length, columns], ….
  """
  of_sum = sum((parts[0].entries[axis] for axis in dims[0]), ())
  outer = [_outer(own.entries, axes) for own, axes in zip(parts, dims, strict=True)]
  sizes = [_outer(local_shape(side.x, own), axes) for side, own, axes in zip(sides, parts, dims, strict=True)]
  is_divided = _size(of_sum) > 1
  if heads is None:
    joins = [not any(own[1:]) for own in outer]
    outer = [own[:1] if joined else own for own, joined in zip(outer, joins, strict=True)]
    sizes = [(math.prod(own),) if joined else own for own, joined in zip(sizes, joins, strict=True)]
  else:
    heads = heads[0] // _size(outer[1][0]), heads[1]
    outer[1], sizes[1] = (outer[1][0], ()), heads

  def run(a: Given, b: Given) -> Array:
    out = _on_device(pair, dims, None if is_divided else dtype, interpret, heads, a, b)
    return out.reshape(*(1,) * is_divided, *sizes[0], *sizes[1])

  in_specs = tuple(_specs(side, own) for side, own in zip(sides, parts, strict=True))
  out_specs = PartitionSpec(*[_entry(of_sum)] * is_divided, *map(_entry, (*outer[0], *outer[1])))
  # A kernel does not declare along which axes its outputs vary, so that check is off.
  found = jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*sides)
  if not is_divided:
    return found
  if found.dtype == jnp.int32 and math.prod(sides[0].x.shape[axis] for axis in dims[0]) > _longest(pair):
    found = found.astype(jnp.float32)
  total = jnp.sum(found, 0, dtype=found.dtype).astype(jnp.float32)
  rows, columns = total.shape[: len(sizes[0])], total.shape[len(sizes[0]) :]
  left, right = sides[0].scale.reshape(*rows, *(1,) * len(columns)), sides[1].scale.reshape(columns)
  return (total * left * right).astype(dtype)


def _specs(side: Given, own: Parts) -> Given:
  return jax.tree.map(lambda x: _spec(x, own.entries), side)


def _entry(names: tuple[str, ...]):
  return names or None


def _spec(x: Array, entries: Entries) -> PartitionSpec:
  """Of an array with the dims of another one, 1 where it has the same number for all."""
  return PartitionSpec(*(_entry(names) if n > 1 else None for n, names in zip(x.shape, entries, strict=True)))


def _on_device(pair: Pair, dims, dtype, interpret, heads: tuple[int, ...] | None, a: Given, b: Given) -> Array:
  """[rows, columns] or with (heads, head_dim) [batch, length, heads, head_dim]: the product of arrays on one device;
  `dtype` None: its sums, without scales.
  """
  flat = [_matrix(x, own) for x, own in zip((a, b), dims, strict=True)]
  if dtype is None:
    flat = [x._replace(scale=None) for x in flat]
  run = functools.partial(tpu.matmul, *flat, pair, dtype=dtype, interpret=interpret)
  if heads is None:
    return run()
  tokens = _outer(a.x.shape, dims[0])
  if (own := _out_heads(tokens, heads)) is None:
    return run().reshape(*tokens, *heads)
  return jnp.swapaxes(run(out_heads=own), 1, 2)


def _is_of_heads(outer, dims) -> bool:
  """Whether the result is [batch, length, heads, head_dim]; `outer`: the sizes of both arrays that it has."""
  return len(outer[0]) == len(outer[1]) == 2 and 0 not in dims[0]


def _out_heads(tokens: tuple[int, ...], heads: tuple[int, ...]) -> tuple[int, ...] | None:
  """The array of heads that the kernel writes; None where it writes a matrix."""
  return (tokens[0], heads[0], tokens[1], heads[1]) if _in_tiles(tokens[1], heads[1]) else None


def _in_tiles(length: int, dim: int) -> bool:
  """Whether tiles of the kernel can be parts of arrays of heads."""
  return length % blocks.LANES == 0 and any(size % dim == 0 for size in blocks.SIZES if dim % blocks.LANES == 0)


def _matrix(x: Given, axes: tuple[int, ...]) -> tpu.Matrix:
  """A device's array as a matrix. The dims that go with the first one are its rows; an array whose rows and columns are
  two dims each, one of tokens and one of heads, is taken in the order batch, heads, length, head_dim.
  """
  first, last = _sides(x.x.ndim, axes)

  def flat(y: Array | None) -> Array | None:
    if y is None:
      return None
    rows = math.prod(y.shape[axis] for axis in first)
    return jnp.transpose(y, (*first, *last)).reshape(rows, math.prod(y.shape[axis] for axis in last))

  order = _order_of_heads(x.x.shape, axes)
  array = flat(x.x) if order is None else jnp.transpose(x.x, order)
  return tpu.Matrix(array, 0 if first == axes else 1, flat(x.up), flat(x.hashes), flat(x.columns), flat(x.scale))


def _sides(ndim: int, axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(row dims, column dims): the group that contains dim 0 is the rows. `axes` is one of the two groups."""
  others = tuple(axis for axis in range(ndim) if axis not in axes)
  return (axes, others) if 0 in axes else (others, axes)


def _order_of_heads(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...] | None:
  """The dims batch, heads, length and head_dim of an array that the kernel takes so; None for a matrix."""
  first, last = _sides(len(shape), axes)
  if len(first) == len(last) == 2 and _in_tiles(shape[first[1]], shape[last[1]]):
    return first[0], last[0], first[1], last[1]
  return None


def _abstract(shape: tuple[int, ...], axes: tuple[int, ...], dtype: Any, *, is_coded: bool) -> tpu.Matrix:
  """`_matrix` without numbers, of codes or of what the kernel makes codes of."""
  order, sides = _order_of_heads(shape, axes), _sides(len(shape), axes)
  own = (
    tuple(math.prod(shape[axis] for axis in side) for side in sides)
    if order is None
    else tuple(shape[axis] for axis in order)
  )
  x: Any = jax.ShapeDtypeStruct(own, dtype)
  return tpu.Matrix(x, 0 if sides[0] == axes else 1, None if is_coded else x)
