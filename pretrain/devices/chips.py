"""Published numbers of TPU chips, and the network of a slice. Sources stand beside the numbers; nothing is measured."""

import dataclasses
import math
import re
from collections.abc import Mapping

from pretrain.errors import ConfigError

GIB = 2**30
NAME = re.compile(r'([a-z0-9]+):(\d+(?:x\d+)*)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One kind of TPU. Rates are per second and per chip; a chip is `devices` devices of JAX.

  `flops`: dense bf16, two for each multiply-add. `hbm`: the bytes that the compiler lets one device use. `link`: bytes
  that one link carries in one direction; a chip has two links for each of the `dims` dimensions of its torus. `dcn`:
  bytes to other slices. `pcie`: bytes between a chip and the memory of its host, each way. `clock`: cycles in which the
  compiler estimates. `pod`: the largest slice. A side is a ring, not a line, where it is a multiple of `ring` (three
  dimensions), or equals the pod's (two).
  """

  name: str
  kinds: tuple[str, ...]  # what JAX calls its devices
  flops: float
  hbm: float
  hbm_rate: float
  link: float
  dims: int
  dcn: float
  pcie: float
  clock: float
  pod: tuple[int, ...]
  host: tuple[int, ...]
  known: tuple[str, ...]
  devices: int = 1

  def rings(self, sides: tuple[int, ...]) -> tuple[bool, ...]:
    """Which sides of a slice have links that close them to a ring.

    Cloud TPU docs, v5p ("4x4x4 cubes"): in three dimensions slices made of whole cubes are tori. v5e, v6e: a side of
    16, the whole pod.
    """
    if self.dims == 2:
      return tuple(side == whole for side, whole in zip(sides, self.pod, strict=True))
    return (all(side % 4 == 0 for side in sides),) * 3


# FLOP/s, HBM and pods: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x. Bytes of links and between slices: Austin
# et al. 2025, jax-ml.github.io/scaling-book/tpus, "TPU specs" (one-way ICI bandwidth per link; DCN egress per TPU;
# PCIe: "typically around 1.5e10 bytes / second per chip", 32 GB/s for v6e; none is published for tpu7x, which has v6e's
# here). hbm: "available HBM" in libtpu 0.0.42's refusal of a program that is too large. clock:
# scripts/bench/schedule.py.
CUBES = ('4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16', '16x16x24')
FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CHIPS: Mapping[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      name='v5e', kinds=('TPU v5 lite', 'TPU v5e'), flops=197e12, hbm=15.75 * GIB, hbm_rate=819e9, link=4.5e10, dims=2,
      dcn=3.125e9, pcie=1.5e10, clock=1.5e9, pod=(16, 16), host=(2, 2), known=FLAT,
    ),
    Chip(
      name='v5p', kinds=('TPU v5', 'TPU v5p'), flops=459e12, hbm=95.74 * GIB, hbm_rate=2765e9, link=9e10, dims=3,
      dcn=6.25e9, pcie=1.5e10, clock=1.75e9, pod=(16, 16, 24), host=(2, 2, 1),
      known=('2x2x1', '2x2x2', '2x2x4', '2x4x4', *CUBES),
    ),
    Chip(
      name='v6e', kinds=('TPU v6 lite', 'TPU v6e'), flops=918e12, hbm=31.25 * GIB, hbm_rate=1638e9, link=9e10, dims=2,
      dcn=12.5e9, pcie=3.2e10, clock=1.75e9, pod=(16, 16), host=(2, 2), known=FLAT,
    ),
    Chip(
      name='tpu7x', kinds=('TPU7x', 'TPU v7x'), flops=2307e12, hbm=94.75 * GIB, hbm_rate=7380e9, link=9e10, dims=3,
      dcn=12.5e9, pcie=3.2e10, clock=1.9e9, pod=(16, 16, 36), host=(2, 2, 1),
      known=('2x2x1', '2x2x2', '2x2x4', '2x4x4', *CUBES),
      devices=2,
    ),
  )
}  # fmt: skip


def of_kind(device_kind: str) -> Chip | None:
  """The chip whose devices JAX calls `device_kind`; None for one that is not in the table."""
  return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def flops_of_kind(device_kind: str) -> float | None:
  """Dense bf16 FLOP/s of one device of this kind, by the maker; None where unknown."""
  chip = of_kind(device_kind)
  return None if chip is None else chip.flops / chip.devices


@dataclasses.dataclass(frozen=True)
class Slice:
  """`slices` equal tori (or meshes) of chips, joined by the data-centre network."""

  chip: Chip
  sides: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f'{self.chip.name}:{"x".join(map(str, self.sides))}'

  @property
  def chips(self) -> int:
    """Chips of one slice."""
    return math.prod(self.sides)

  @property
  def devices(self) -> int:
    """JAX devices of all slices."""
    return self.chips * self.chip.devices * self.slices

  @property
  def rings(self) -> tuple[bool, ...]:
    return self.chip.rings(self.sides)

  @property
  def flops(self) -> float:
    """Peak FLOP/s of one device."""
    return self.chip.flops / self.chip.devices

  @property
  def hbm_rate(self) -> float:
    """Bytes/s between one device and its HBM."""
    return self.chip.hbm_rate / self.chip.devices

  @property
  def host_rate(self) -> float:
    """Bytes/s between one device and the memory of its host, each way."""
    return self.chip.pcie / self.chip.devices


def parse(topology: str, slices: int = 1) -> Slice:
  """The slice of e.g. 'v5p:4x4x8'. Raises ConfigError for one that does not exist, naming those that do."""
  found = NAME.fullmatch(topology)
  chip = CHIPS.get(found[1]) if found else None
  if slices < 1:
    raise ConfigError(f'--num_slices={slices} is not a number of slices; give 1 or more.')
  if found is None or chip is None:
    raise ConfigError(
      f'--topology={topology} is not a TPU slice; write CHIP:SIZES with a chip of {", ".join(CHIPS)}, e.g. v5e:2x4 or '
      'v5p:2x2x1.'
    )
  sides = tuple(int(n) for n in found[2].split('x'))
  fits = len(sides) == chip.dims and all(0 < a <= b for a, b in zip(sorted(sides), sorted(chip.pod), strict=True))
  if not fits or any(side % own for side, own in zip(sides, chip.host, strict=True)):
    host = 'x'.join(map(str, chip.host))
    raise ConfigError(
      f'--topology={topology} is not a TPU slice: one of {chip.name} has {chip.dims} sides, multiples of a host '
      f'({host}), at most {"x".join(map(str, chip.pod))}. Known: '
      f'{", ".join(f"{chip.name}:{sizes}" for sizes in chip.known)}.'
    )
  return Slice(chip, sides, slices)
