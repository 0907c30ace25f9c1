"""Where the axes of a mesh lie on a slice, and how long collectives take there.

Source of the formulas: Austin et al. 2025, jax-ml.github.io/scaling-book/sharding: on a ring both directions of each
link carry data, and several sides of a torus work at once.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.devices.chips import Slice
from pretrain.devices.mesh import arrange

HOP = 1e-6  # seconds from a chip to the next, scaling-book/sharding, "latency bound"
MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{(['\w,]*)\}")
IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')


@dataclasses.dataclass(frozen=True)
class Place:
  """A device that need not exist; JAX arranges a mesh by these fields."""

  id: int
  coords: tuple[int, int, int]
  core_on_chip: int
  slice_index: int
  device_kind: str
  process_index: int = 0
  platform: str = 'tpu'


def places(of: Slice) -> list[Place]:
  """The devices of all slices, in libtpu's order of coordinates: the first side runs fastest."""
  sides = (*of.sides, *(1,) * (3 - len(of.sides)))
  spots = [tuple(reversed(c)) for c in itertools.product(*(range(n) for n in reversed(sides)))]
  found = itertools.product(range(of.slices), spots, range(of.chip.devices))
  return [Place(i, spot, core, s, of.chip.kinds[0]) for i, (s, spot, core) in enumerate(found)]


@dataclasses.dataclass(frozen=True)
class Group:
  """Devices that take part in one collective: how many positions they have on each side of a slice, how many cores of a
  chip, and how many slices."""

  sides: tuple[int, ...]
  cores: int
  slices: int

  @property
  def inside(self) -> int:
    """Devices in one slice."""
    return math.prod(self.sides) * self.cores


def group(devices: Sequence[Any], of: Slice) -> Group:
  """The group of these devices."""
  spread = lambda key: len({key(d) for d in devices})
  sides = tuple(spread(lambda d, i=i: d.coords[i]) for i in range(len(of.sides)))
  return Group(sides, spread(lambda d: d.core_on_chip), spread(lambda d: getattr(d, 'slice_index', None) or 0))


def groups(sizes: Mapping[str, int], of: Slice) -> dict[tuple[str, ...], Group]:
  """The group of each set of neighbouring mesh axes of more than one device that collectives of a step run over."""
  grid, axes = arrange(tuple(sizes.values()), places(of), of.slices), list(sizes)
  found = {}
  for number in range(1, len(axes) + 1):
    for names in itertools.combinations([a for a in axes if sizes[a] > 1], number):
      where = tuple(slice(None) if axis in names else 0 for axis in axes)
      found[names] = group(list(np.ravel(grid[where])), of)
  return found


# Chips for which libtpu 0.0.42 gathers over one ring through all devices, whatever their sides ("1DAllGather…").
ONE_RING = ('v5e',)


def gather_rings(of: Slice, over: Group) -> int:
  """Over how many sides at once libtpu gathers. A group that has only a part of a side gets one ring through all its
  devices: UL2 20B on v5p:4x4x8 with fsdp=64 (4 x 2 x 8) is compiled to 1DAllGather, fsdp=16 (4 x 4) to 2DAllGather.
  """
  part = any(1 < n < side for n, side in zip(over.sides, of.sides, strict=True))
  return 1 if part or of.chip.name in ONE_RING else 3


def rate(of: Slice, over: Group, rings: int = 3) -> float:
  """Bytes/s at which each device of a group receives an all-gather inside its slice, over at most so many `rings`.

  A side counts with two links where the group has all of a ring, else with one: the ends of a line have one.
  """
  whole = [r and n == side for r, n, side in zip(of.rings, over.sides, of.sides, strict=True)]
  links = sum((2 if ring and n > 2 else 1) for ring, n in zip(whole, over.sides, strict=True) if n > 1)
  share = over.cores / of.chip.devices  # cores of a chip outside the group use its links too
  return (min(links, 2 * rings) or math.inf) * of.chip.link * share


def hops(of: Slice, over: Group) -> int:
  """The longest way between two devices of a group."""
  return sum(n // 2 if r and n == side else n - 1 for r, n, side in zip(of.rings, over.sides, of.sides, strict=True))


@dataclasses.dataclass(frozen=True)
class Time:
  """Seconds on the links of a slice, and between slices."""

  ici: float = 0.0
  dcn: float = 0.0

  def __add__(self, other: 'Time') -> 'Time':
    return Time(self.ici + other.ici, self.dcn + other.dcn)

  def times(self, number: float) -> 'Time':
    return Time(self.ici * number, self.dcn * number)

  @property
  def total(self) -> float:
    return self.ici + self.dcn


def seconds(kind: str, size: float, of: Slice, over: Group, rings: int | None = None) -> Time:
  """The time of one collective of `size` bytes: of the whole array at one device, before or after (the larger).

  all-reduce = reduce-scatter + all-gather. Between slices only the part that a device holds of its slice's sum moves.
  `rings`: over how many sides at once; by default as libtpu does.
  """
  rings = rings or (gather_rings(of, over) if kind == 'all-gather' else 3)
  inside, passes = over.inside, 2 if kind == 'all-reduce' else 1
  if kind == 'collective-permute':
    return Time(size / of.chip.link + HOP)
  if inside <= 1 and over.slices <= 1:
    return Time()
  if kind == 'all-to-all':
    return Time(size * (inside - 1) / 4 / rate(of, over, rings) + hops(of, over) * HOP)
  ici = passes * (size * (1 - 1 / inside) / rate(of, over, rings) + hops(of, over) * HOP)
  return Time(ici, passes * size / inside * (1 - 1 / over.slices) / (of.chip.dcn / of.chip.devices))


def between(kind: str, size: float, of: Slice) -> Time:
  """The time of a collective between slices in which each device sends `size` bytes, its part of an array.

  What returns is as much, or for a gather the parts of the other slices; in an all-reduce each slice sums up its share.
  """
  others = of.slices - 1
  shares = {'all-reduce': 2 * others / of.slices, 'all-gather': others, 'collective-permute': 1}
  return Time(dcn=size * shares.get(kind, others / of.slices) / (of.chip.dcn / of.chip.devices))


def members(text: str, number: int) -> list[int]:
  """The first group of a collective's `replica_groups` in a compiled program over `number` devices.

  Raises ValueError for a text of another form: all devices in its place would be links that the collective lacks.
  """
  if found := MESH.match(text):
    names, sizes = zip(*(part.split('=') for part in found[1].split(',')), strict=True)
    sizes, used = [int(n) for n in sizes], found[5].split(',')
    ids = _order(found, number).reshape(sizes)
    return np.ravel(ids[tuple(slice(None) if n in used else 0 for n in names)]).tolist()
  if found := IOTA.match(text):
    shape, dims = ([int(n) for n in found[i].split(',')] for i in (1, 2))
    ids = np.arange(number).reshape(dims)
    ids = ids.transpose([int(n) for n in found[3].split(',')]) if found[3] else ids
    return ids.reshape(shape)[0].tolist()
  if found := re.match(r'\{\{([\d,]+)\}', text):
    return [int(n) for n in found[1].split(',')]
  if text not in ('', '{}'):
    raise ValueError(f'groups of a collective in a form that is not known: {text[:200]}')
  return list(range(number))


def connected(pairs: str) -> tuple[int, ...]:
  """The devices that the first of `source_target_pairs` reaches, over any number of hops.

  >>> connected('{0,1},{4,5},{1,0},{5,4}')
  (0, 1)
  """
  left = [{int(n) for n in pair.split(',')} for pair in re.findall(r'\{(\d+,\d+)\}', pairs)]
  found = left.pop(0)
  while near := [pair for pair in left if pair & found]:
    left = [pair for pair in left if not pair & found]
    found = found.union(*near)
  return tuple(sorted(found))


def _order(found: re.Match[str], number: int) -> np.ndarray:
  """The devices of a mesh in the order of its axes: a list, or a transposed range."""
  if found[4]:
    return np.array([int(n) for n in found[4].split(',')])
  if found[2]:
    ids = np.arange(number).reshape([int(n) for n in found[2].split(',')])
    return ids.transpose([int(n) for n in found[3].split(',')]) if found[3] else ids
  return np.arange(number)
