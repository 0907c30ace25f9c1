"""Parameters from files onto their devices, and into files, a block at a time: the host holds only a few blocks."""

import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from models.specs import ParamSpec
from pretrain.interchange.layout import Entry, Index
from pretrain.interchange.safetensors import READ, Tensor, not_finite
from pretrain.interchange.zarr import Array, damaged

BLOCK = 4 * 2**20  # elements: 16 MiB of float32

Tensors = Mapping[tuple[int, ...], Tensor | Array]


def place(entry: Entry, spec: ParamSpec, tensors: Tensors, row: Tensor | None, sharding: jax.sharding.Sharding):
  """The parameter, of which each device gets its part alone; devices with the same part get copies of the first."""
  first: dict[tuple, jax.Array] = {}
  arrays = []
  for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
    wanted = [range(*own.indices(size)) for own, size in zip(index, spec.shape, strict=True)]
    key = tuple(wanted)
    if key not in first:
      first[key] = _part(entry, spec, _values(entry, spec, tensors, row, wanted), wanted, device)
    arrays.append(first[key] if device in first[key].devices() else jax.device_put(first[key], device))
  return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


def _part(entry: Entry, spec: ParamSpec, values: Iterator[tuple[Index, np.ndarray]], wanted, device) -> jax.Array:
  shape = tuple(map(len, wanted))
  if np.prod(shape) <= BLOCK:  # one transfer, and no program
    part = np.empty(shape, spec.dtype)
    for into, block in values:
      part[into] = block
    return jax.device_put(part, device)
  whole = jnp.zeros(shape, spec.dtype, device=device)
  for into, block in values:
    block = np.ascontiguousarray(block, spec.dtype).reshape([1] * entry.stacked + list(block.shape))
    whole = _put(whole, jax.device_put(block, device), [own if type(own) is int else own.start for own in into])
    whole.block_until_ready()  # so that the next block takes the place of this one
  return whole


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, block: jax.Array, start: list[int]) -> jax.Array:
  return jax.lax.dynamic_update_slice(whole, block, start)


def _values(entry: Entry, spec: ParamSpec, tensors: Tensors, row: Tensor | None, wanted) -> Iterator[tuple]:
  """(where in the part, values) of each block: a place for each stacked axis, a slice for each other one."""
  stacked = entry.stacked
  added = None if row is None else row.read(0, row.shape[-1]).astype(np.float32)[wanted[-1].start : wanted[-1].stop]
  for at in np.ndindex(*map(len, wanted[:stacked])):
    tensor = tensors[tuple(own[i] for own, i in zip(wanted, at, strict=False))]
    for into, own in _blocks(entry, spec, tensor, wanted[stacked:]):
      yield (*at, *into), entry.fold(own, added)


def _blocks(entry: Entry, spec: ParamSpec, tensor: Tensor | Array, wanted) -> Iterator[tuple[Index, np.ndarray]]:
  """Blocks of a file have at most BLOCK elements, or a row; those of a zarr folder are its chunks."""
  if isinstance(tensor, Array):
    for into, values in entry.boxes(spec, wanted, tensor.chunks, tensor.read):
      if not np.isfinite(values).all():
        raise damaged(tensor.path, f'{tensor.name} has values that are not finite')
      yield into, values
    return
  for block in entry.blocks(spec, wanted, BLOCK):
    elements = tensor.read(block.begin, block.end)
    if not np.isfinite(elements).all():
      raise not_finite(tensor, elements, block.begin)
    yield block.into, entry.of_block(elements, spec, block)


def write(
  entry: Entry, spec: ParamSpec, tensor: Tensor, values: np.ndarray, before: Tensor | None, row: np.ndarray | None
) -> None:
  """Puts `values`, the part of the parameter that `tensor` holds, into its file; other places of it stay.

  `before` is the tensor that was imported, see `Entry.write`.
  """
  for block in entry.blocks(spec, [range(size) for size in values.shape], BLOCK):
    elements = tensor.read(block.begin, block.end)
    old = None if before is None else before.read(block.begin, block.end)
    added = None if row is None else row[block.into[-1]]
    entry.write(elements, spec, block, values[block.into], old, added)
    tensor.write(block.begin, elements)


def copy(source: Tensor, into: Tensor) -> None:
  """Writes the values of `source` to the file of `into`, in its type."""
  count = math.prod(source.shape)
  for begin in range(0, count, BLOCK):
    into.write(begin, source.read(begin, min(begin + BLOCK, count)).astype(READ[into.dtype]))
