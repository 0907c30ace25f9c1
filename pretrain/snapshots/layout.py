"""Which bytes of the state each process keeps in a snapshot: its share, a pure function of shapes and shardings.

A shard that several devices hold is cut along its longest dim into one piece per device, so that replicas divide the
copying and the memory evenly (REFT's sharded snapshots: Wang et al. 2023, arXiv:2310.12670, §4.1). The block of a
process is the concatenation of its pieces. Every process can compute in which block, and where, any piece is.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from models.host_memory import HOST
from pretrain.devices.host_memory import in_turn
from pretrain.replicas import digest

Index = tuple[tuple[int, int], ...]  # (start, stop) of each dim
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of one array: its index in the array, the shard of `device` that has it, its offset in `process`'s block."""

  leaf: int
  index: Index
  shard: Index
  device: Any
  process: int
  offset: int
  size: int


class Layout:
  """The pieces of a state of these shapes, dtypes and shardings, and the bytes of the block of each process."""

  def __init__(self, abstract: Any):
    self.leaves = jax.tree.leaves(abstract)
    self.pieces: list[Piece] = []
    self.sizes: dict[int, int] = {}
    for number, leaf in enumerate(self.leaves):
      for shard, devices in holders(leaf).items():
        for device, index in zip(devices, cut(shard, len(devices)), strict=True):
          self._add(number, leaf, index, shard, device)

  def _add(self, number: int, leaf, index: Index, shard: Index, device) -> None:
    size = int(np.prod([stop - start for start, stop in index])) * leaf.dtype.itemsize
    if size:
      offset, process = self.sizes.get(device.process_index, 0), device.process_index
      self.pieces.append(Piece(number, index, shard, device, process, offset, size))
      self.sizes[process] = -(-(offset + size) // ALIGNMENT) * ALIGNMENT

  def of(self, process: int) -> list[Piece]:
    return [piece for piece in self.pieces if piece.process == process]

  def fingerprint(self, abstract: Any) -> str:
    """Equal for layouts that put the same bytes of the same arrays at the same offsets."""
    names = [digest.key_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]]
    lines = [f'{name} {leaf.shape} {leaf.dtype}' for name, leaf in zip(names, self.leaves, strict=True)]
    lines += [f'{p.leaf} {p.index} {p.process} {p.offset}' for p in self.pieces]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def holders(leaf) -> dict[Index, list[Any]]:
  """Every distinct shard of an array, and the devices that hold it, ordered by device id."""
  found: dict[Index, list[Any]] = {}
  for device, slices in leaf.sharding.devices_indices_map(leaf.shape).items():
    index = tuple(s.indices(n)[:2] for s, n in zip(slices, leaf.shape, strict=True))
    found.setdefault(index, []).append(device)
  return {index: sorted(devices, key=lambda d: d.id) for index, devices in sorted(found.items())}


def cut(index: Index, parts: int) -> list[Index]:
  """`index` cut into `parts` along its longest dim; parts of a short dim may be empty; a scalar is in the first part.

  >>> cut(((0, 2), (4, 8)), 2)
  [((0, 2), (4, 6)), ((0, 2), (6, 8))]
  """
  if not index:
    return [(), *(((0, 0),) for _ in range(parts - 1))]
  lengths = [stop - start for start, stop in index]
  dim = lengths.index(max(lengths))
  bounds = [index[dim][0] + lengths[dim] * i // parts for i in range(parts + 1)]
  return [(*index[:dim], (bounds[i], bounds[i + 1]), *index[dim + 1 :]) for i in range(parts)]


def within(index: Index, shard: Index) -> tuple[slice, ...]:
  """Slices inside `shard` of `index`, which counts in the whole array."""
  return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(index, shard, strict=True))


class Copies:
  """Starts to copy this process's pieces of a state, before the next step reuses its buffers, and does not wait.

  The copies are programs on the devices, queued after the step that makes the state. On accelerators they go to pinned
  host RAM, so that device memory holds no second state.
  """

  def __init__(self, layout: Layout, process: int):
    self._mine: dict[Any, list[Piece]] = {}
    for piece in layout.of(process):
      self._mine.setdefault(piece.device, []).append(piece)
    self._programs = {device: copying(device, pieces) for device, pieces in self._mine.items()}

  def begin(self, state: Any) -> list[tuple[Piece, Array]]:
    """(piece, its copy, which may still be running) for each piece of this process."""
    leaves, found = jax.tree.leaves(state), []
    local = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
    for device, pieces in self._mine.items():
      found += zip(pieces, self._programs[device]([local[piece.leaf][device] for piece in pieces]), strict=True)
    return found


def copying(device, pieces: Sequence[Piece]) -> Callable[[Sequence[Array]], list[Array]]:
  """A compiled program from the shards on `device` to their pieces."""
  where = [within(piece.index, piece.shard) for piece in pieces]
  kind = None if device.platform == 'cpu' else HOST
  placed = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
  # A copy even if the piece is the whole shard: without it the output would alias the state, which is donated.
  one = lambda x, i: jax.device_put(jax.numpy.copy(x[i]), placed)
  return jax.jit(lambda xs: in_turn(one, xs, where), out_shardings=placed)


def write(block: np.ndarray, copies: Sequence[tuple[Piece, Array]]) -> None:
  """Writes each piece at its offset in `block` (uint8); waits for each copy."""
  for piece, copy in copies:
    block[piece.offset : piece.offset + piece.size] = np.asarray(copy).reshape(-1).view(np.uint8)


def assemble(abstract: Any, layout: Layout, process: int, read: Callable[[Piece], np.ndarray]) -> Any:
  """The state on this process's devices, from the bytes of every piece of their shards."""
  leaves, by_shard = jax.tree.leaves(abstract), {}
  for piece in layout.pieces:
    by_shard.setdefault((piece.leaf, piece.shard), []).append(piece)
  made = [_assemble(i, leaf, process, by_shard, read) for i, leaf in enumerate(leaves)]
  return jax.tree.unflatten(jax.tree.structure(abstract), made)


def _assemble(number: int, leaf, process: int, by_shard: Mapping[Any, Sequence[Piece]], read) -> Array:
  arrays = []
  for shard, devices in holders(leaf).items():
    if not (local := [device for device in devices if device.process_index == process]):
      continue
    whole = np.empty([stop - start for start, stop in shard], leaf.dtype)
    for piece in by_shard.get((number, shard), ()):
      shape = [stop - start for start, stop in piece.index]
      whole[within(piece.index, shard)] = read(piece).view(leaf.dtype).reshape(shape)
    # No alias: the step overwrites its input.
    places = [jax.sharding.SingleDeviceSharding(d, memory_kind=leaf.sharding.memory_kind) for d in local]
    arrays += [jax.device_put(whole, place, may_alias=False) for place in places]
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
