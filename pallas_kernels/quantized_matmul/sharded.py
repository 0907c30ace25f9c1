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
from pallas_kernels.quantized_matmul.reference import EXACT_SUM, float_scales, largest_size
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
  a: Any, b: Any, pair: Pair, dims, parts: tuple[Parts, Parts] | None = None, *, dtype: Any = None, interpret: Any = False
) -> Array:
  """`reference.product` of two (array, noise) by the kernel in `dtype`, by default that of the first. `parts`: how the
  mesh divides both; without it they are on one device.

  Raises KernelError for formats with a scale for each block, for sums that an int32 may not hold, and on several
  devices without `parts`, or where these do not divide a dim.
  """
  dtype, mesh = a[0].dtype if dtype is None else dtype, jax.sharding.get_abstract_mesh()
  several = not mesh.empty and mesh.size > 1
  check(a[0], b[0], pair, dims, parts)
  shape = _outer(a[0], dims[0]) + _outer(b[0], dims[1])
  if parts is not None:
    b, dims, parts = _flat_weight(b, dims, parts)
  sides = [_given(*side, own, operand) for side, own, operand in zip((a, b), dims, pair, strict=True)]
  if _is_made_before(sides, dims, parts if several else None, dtype):
    sides[1] = coded(sides[1], pair[1], parts[1] if several and parts else None)
  heads = shape[-2:] if len(shape) == 4 and 0 not in dims[0] else None
  if not several or parts is None:
    return _on_device(pair, dims, dtype, interpret, heads, *sides).reshape(shape)
  return _on_each(sides, pair, dims, parts, dtype, interpret, heads).reshape(shape)


def fits(a: Array, b: Array, pair: Pair, dims, parts: tuple[Parts, Parts] | None) -> bool:
  """Whether the kernel has this product on the mesh in use."""
  try:
    check(a, b, pair, dims, parts)
  except KernelError:
    return False
  return all(operand.scale != 'delayed' for operand in pair)


def check(a: Array, b: Array, pair: Pair, dims, parts: tuple[Parts, Parts] | None) -> None:
  """Raises KernelError, with the fix, for a product that the kernel does not have on the mesh in use."""
  blocked = [operand.format for operand in pair if not operand.in_hardware]
  kinds = {operand.element.is_integer for operand in pair}
  if blocked or len(kinds) > 1:
    raise KernelError(
      f"kernels.quantized_matmul='tpu' has no {' and '.join(blocked) or 'products of integers and fp8'}; it has int8, "
      "int4 and fp8 with scales of tensors or channels. Use 'auto' or 'xla'."
    )
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    _check_parts((a, b), parts, mesh)
  count = math.prod(n for axis, n in enumerate(local_shape(a, parts and parts[0])) if axis in dims[0])
  if kinds == {True} and count > _longest(pair):
    raise KernelError(
      f"kernels.quantized_matmul='tpu' sums {count} products of {pair[0].format} in an int32, which may overflow; use "
      "'auto' or 'xla', or smaller batches."
    )


def _check_parts(arrays, parts: tuple[Parts, Parts] | None, mesh) -> None:
  if parts is None:
    raise KernelError(
      f"kernels.quantized_matmul='tpu' does not know how this mesh of {mesh.size} devices divides a product (a pipeline "
      "of mesh.stage, or part of a larger kernel); use 'auto' or 'xla', whose products the partitioner divides."
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
  if noise is None:
    raise KernelError("quantized_matmul rounds stochastically and has no seed; pass `seed`, or rounding='nearest'.")
  if noise.columns is None:
    last = jnp.arange(x.shape[-1], dtype=jnp.uint32).reshape(*(1,) * (x.ndim - 1), -1)
    noise = noise._replace(rows=noise.rows[..., None], columns=last)
  return Given(x, up, scale, row_hashes(noise), noise.columns * jnp.uint32(COLUMN))


def coded(side: Given, operand: Operand, own: Parts | None = None) -> Given:
  """The same with codes in the place of numbers, made by XLA: of a weight that is kept divided, where it is kept."""
  random = None if side.hashes is None else mix(side.hashes ^ side.columns)
  found = rounded(side.x.astype(jnp.float32) * side.up, operand.element, random)
  codes = found.astype(jnp.int8 if operand.element.is_integer else operand.element.dtype)
  if own is not None and own.stored is not None:
    codes = jax.lax.with_sharding_constraint(codes, _spec(codes, own.stored))
  return Given(codes, None, side.scale)


def _is_made_before(sides: list[Given], dims, parts: tuple[Parts, Parts] | None, dtype: Any) -> bool:
  """Whether codes of the second matrix are made before the kernel: a weight's are, to be gathered as codes, and those
  that the kernel would make again for each block of rows.
  """
  if parts is not None and parts[1].stored is not None:
    return True
  m, k, n = sizes_of(sides[0].x, sides[1].x, dims, parts)
  bytes_of = (x.dtype.itemsize for x in (sides[0].x, sides[1].x, jnp.zeros((), dtype)))
  return blocks.choose(blocks.Shape(m, k, n, *bytes_of, kept=True), blocks.chip_in_use()).m < m


def sizes_of(a: Array, b: Array, dims, parts: tuple[Parts, Parts] | None) -> tuple[int, int, int]:
  """(rows, length of the sums, columns) of one device's product."""
  of_a, of_b = (local_shape(x, own) for x, own in zip((a, b), parts or (None, None), strict=True))
  own = lambda shape, axes: math.prod(n for axis, n in enumerate(shape) if axis not in axes)
  return own(of_a, dims[0]), math.prod(of_a[axis] for axis in dims[0]), own(of_b, dims[1])


def _outer(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(n for axis, n in enumerate(x.shape) if axis not in axes)


def _flat_weight(b: Any, dims, parts: tuple[Parts, Parts]):
  """(b, dims, parts) with a weight as a matrix, so that it is gathered as one: else devices copy it after that."""
  (x, noise), own, axes = b, parts[1], dims[1]
  if own.stored is None:
    return b, dims, parts
  first = axes if 0 in axes else tuple(axis for axis in range(x.ndim) if axis not in axes)
  groups = (first, tuple(axis for axis in range(x.ndim) if axis not in first))
  if any(names[axis] for names in (own.entries, own.stored) for group in groups for axis in group[1:]):
    return b, dims, parts  # a dim inside is divided
  merge = lambda entries: tuple(entries[group[0]] for group in groups)
  size = lambda x, group: math.prod(x.shape[axis] for axis in group)
  flat = lambda x: x.reshape(*(size(x, group) for group in groups))
  noise = None if noise is None else noise._replace(rows=flat(noise.rows), columns=flat(noise.columns))
  return (flat(x), noise), (dims[0], (0,) if axes == first else (1,)), (parts[0], Parts(merge(own.entries), merge(own.stored)))


def _on_each(sides, pair: Pair, dims, parts: tuple[Parts, Parts], dtype, interpret, heads) -> Array:
  """On each device the product of its parts, and the sum of these over the devices that divide what is summed over."""
  names = sum((parts[0].entries[axis] for axis in dims[0]), ())
  in_specs = tuple(jax.tree.map(lambda x, own=own: _spec(x, own.entries), side) for side, own in zip(sides, parts))
  kept = [[n for axis, n in enumerate(own.entries) if axis not in axes] for own, axes in zip(parts, dims, strict=True)]
  flat = not any(n for own in kept for n in own[1:])
  if heads is not None:
    heads = heads[0] // _size(kept[1][0]), heads[1]
    entries = (*kept[0], kept[1][0], ())
  else:
    entries = tuple(own[0] for own in kept) if flat else (*kept[0], *kept[1])

  def run(a, b):
    out = _on_device(pair, dims, None if is_divided else dtype, interpret, heads, a, b)
    if heads is None:
      out = out.reshape(*(math.prod(_outer(x.x, own)) for x, own in zip((a, b), dims, strict=True))) if flat else (
        out.reshape(*_outer(a.x, dims[0]), *_outer(b.x, dims[1])))
    return out[None] if is_divided else out

  is_divided = _size(names) > 1
  specs = PartitionSpec(*([_entry(names)] if is_divided else []), *map(_entry, entries))
  each = jax.shard_map(run, in_specs=in_specs, out_specs=specs, check_vma=False)(*sides)
  if not is_divided:
    return each
  count = math.prod(sides[0].x.shape[axis] for axis in dims[0])
  if each.dtype == jnp.int32 and count > _longest(pair):
    each = each.astype(jnp.float32)
  total = jnp.sum(each, 0, dtype=each.dtype).astype(jnp.float32)
  # `rows` dims of the total go with those of the first matrix; the others with the second one's.
  rows = 1 if flat and heads is None else len(kept[0])
  left = sides[0].scale.reshape(*total.shape[:rows], *(1,) * (total.ndim - rows))
  return (total * left * sides[1].scale.reshape(total.shape[rows:])).astype(dtype)


def _entry(names: tuple[str, ...]):
  return names or None


def _spec(x: Array, entries: Entries) -> PartitionSpec:
  """Of an array with the dims of another one, 1 where it has the same number for all."""
  return PartitionSpec(*(_entry(names) if n > 1 else None for n, names in zip(x.shape, entries, strict=True)))


def _on_device(pair: Pair, dims, dtype, interpret, heads, a: Given, b: Given) -> Array:
  """[rows, columns] or with `heads` = (heads, head_dim) [batch, length, heads, head_dim]: the product of two arrays that
  are on one device; `dtype` None: its sums, without scales.
  """
  flat = [_matrix(x, own) for x, own in zip((a, b), dims, strict=True)]
  if dtype is None:
    flat = [x._replace(scale=None) for x in flat]
  run = functools.partial(tpu.matmul, *flat, pair, dtype=dtype, interpret=interpret)
  if heads is None:
    return run()
  batch, length = _outer(a.x, dims[0])
  if not _in_tiles(length, heads[1]):
    return run().reshape(batch, length, *heads)
  return jnp.swapaxes(run(out_heads=(batch, heads[0], length, heads[1])), 1, 2)


def _in_tiles(length: int, dim: int) -> bool:
  """Whether tiles of the kernel can be parts of arrays of heads."""
  return dim % blocks.LANES == 0 and length % blocks.LANES == 0


def _matrix(x: Given, axes: tuple[int, ...]) -> tpu.Matrix:
  """A device's array as a matrix. The dims that go with the first one are its rows; an array whose rows and columns are
  two dims each, one of tokens and one of heads, is taken in the order batch, heads, length, head_dim.
  """
  others = tuple(axis for axis in range(x.x.ndim) if axis not in axes)
  first, last = (axes, others) if 0 in axes else (others, axes)

  def flat(y: Array | None) -> Array | None:
    if y is None:
      return None
    rows = math.prod(y.shape[axis] for axis in first)
    return jnp.transpose(y, (*first, *last)).reshape(rows, math.prod(y.shape[axis] for axis in last))

  array = flat(x.x)
  if len(first) == len(last) == 2 and _in_tiles(x.x.shape[first[1]], x.x.shape[last[1]]):
    array = jnp.transpose(x.x, (first[0], last[0], first[1], last[1]))
  return tpu.Matrix(array, 0 if first == axes else 1, flat(x.up), flat(x.hashes), flat(x.columns), flat(x.scale))
