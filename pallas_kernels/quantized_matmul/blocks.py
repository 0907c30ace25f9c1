"""Tile sizes of the kernel: the least time that a chip needs for its products and for the bytes that they move."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

from pallas_kernels import tuned
from pallas_kernels.errors import KernelError

MIB = 2**20
SIZES = (2048, 1024, 512, 256, 128)
LANES = 128
WIDTH = 256  # of a matrix unit; 128 on v5e and v5p
START = 500  # cycles of a step beside its products
AGAIN = 0.15  # what reading and writing the accumulator adds to a product that is summed in several steps


@dataclasses.dataclass(frozen=True)
class Chip:
  """`limit`: bytes of fast memory that a kernel may use; `rate`: bytes of HBM in a cycle; `products`: multiplications
  of 8-bit numbers in a cycle. Of all `cores` of a device, which share the blocks of rows; `limit` is that of each.
  """

  limit: int
  rate: float
  products: float
  cores: int = 1

  @property
  def tiles(self) -> int:
    """Bytes for tiles, sums and codes; the rest is for what the compiler puts beside them."""
    return self.limit * 9 // 10


# Google Cloud's pages of each TPU version: HBM bandwidth and peak of int8 (of fp8 on tpu7x) over the clock.
CHIPS = {
  'v5e': Chip(100 * MIB, 819 / 1.5, 394e3 / 1.5 / 2),
  'v5p': Chip(56 * MIB, 2765 / 1.75, 918e3 / 1.75 / 2, cores=2),
  'v6e': Chip(100 * MIB, 1640 / 1.75, 1836e3 / 1.75 / 2),
  'tpu7x': Chip(56 * MIB, 3690 / 1.9, 2307e3 / 1.9 / 2),
}
DEFAULT = CHIPS['v5p']


@dataclasses.dataclass(frozen=True)
class Shape:
  """A product [m, k] x [k, n]. Bytes of one number: as they are read, and as they are written. `kept`: whether codes of
  the first matrix are kept in fast memory while all blocks of the second one pass; `copied`: whether the kernel writes
  a tile of codes of the second one. `rows` and `columns`, for each of m, k and n: lengths and head_dims of the arrays
  of heads in which it is (batch, length) or (heads, head_dim).
  """

  m: int
  k: int
  n: int
  a_bytes: int
  b_bytes: int
  out_bytes: int
  kept: bool
  copied: bool
  rows: tuple[tuple[int, ...], ...] = ((), (), ())
  columns: tuple[tuple[int, ...], ...] = ((), (), ())

  def allows(self, dim: int, size: int) -> bool:
    """Whether tiles may have this size along m (0), k or n: whole parts of rows or of a batch, and whole heads."""
    whole = (self.m, self.k, self.n)[dim]
    if (self.rows[dim] or self.columns[dim]) and whole % size:
      return False
    of_rows = all(length % size == 0 or size % length == 0 for length in self.rows[dim])
    return of_rows and all(size % head_dim == 0 for head_dim in self.columns[dim])


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of a tile. Those of m and n may leave a part of the last tile empty; that of k divides it."""

  m: int
  k: int
  n: int

  def grid(self, of: Shape) -> tuple[int, int, int]:
    return -(-of.m // self.m), -(-of.n // self.n), of.k // self.k

  def vmem(self, of: Shape) -> int:
    """Bytes: two tiles of each array, the sums, and codes."""
    tiles = self.m * self.k * of.a_bytes + self.k * self.n * of.b_bytes + self.m * self.n * of.out_bytes
    codes = (self.m * of.k if of.kept else 0) + (self.k * self.n if of.copied else 0)
    return 2 * tiles + 2 * 4 * self.m * self.n + codes

  def bytes_moved(self, of: Shape) -> int:
    """From and to HBM. A tile that is the same as in the step before is not read again."""
    rows, columns, steps = self.grid(of)
    passes_of_a = 1 if of.kept or steps == 1 else columns
    passes_of_b = 1 if columns == steps == 1 else rows
    read = of.m * of.k * of.a_bytes * passes_of_a + of.k * of.n * of.b_bytes * passes_of_b
    return read + of.m * of.n * of.out_bytes

  def cycles(self, of: Shape, chip: Chip) -> float:
    """The larger of what the products and what their bytes take."""
    rows, columns, steps = self.grid(of)
    tile = _wide(self.m) * _wide(self.n) * self.k / chip.products * (1 if steps == 1 else 1 + AGAIN)
    in_turn = -(-rows // chip.cores) * columns * steps
    return max(in_turn * (tile * chip.cores + START), self.bytes_moved(of) / chip.rate)


def chip_in_use() -> Chip:
  return CHIPS.get(tuned.chip_of(tuned.device_kind()) or '', DEFAULT)


def choose(of: Shape, chip: Chip, formats: Iterable[str] = ()) -> Blocks:
  """The blocks with the fewest cycles that fit, of those the largest. Raises KernelError where none fits, with the
  `formats` of both matrices.
  """
  if (found := fitting(of, chip)) is not None:
    return found
  least, named = min(blocks.vmem(of) for blocks in _every(of)), ' and '.join(dict.fromkeys(formats))
  raise KernelError(
    f"kernels.quantized_matmul='tpu' has no tiles for [{of.m}, {of.k}] x [{of.k}, {of.n}] on one device"
    f'{named and f" in {named}"}: the smallest take {_mib(least)} MiB of '
    f"the {_mib(chip.tiles)} MiB that tiles may have of this chip's limit of {_mib(chip.limit)} MiB of VMEM. Use "
    "kernels.quantized_matmul='auto' or 'xla', or a smaller batch where tokens are summed."
  )


def _mib(count: int) -> str:
  return f'{count / MIB:.1f}'


@functools.cache
def fitting(of: Shape, chip: Chip) -> Blocks | None:
  """As `choose`; None where no blocks fit."""
  found = [blocks for blocks in _every(of) if blocks.vmem(of) <= chip.tiles]
  cost = lambda blocks: (round(blocks.cycles(of, chip), -2), -blocks.k, -blocks.m * blocks.n)
  return min(found, key=cost, default=None)


def _every(of: Shape) -> list[Blocks]:
  summed = [of.k // parts for parts in range(1, of.k // LANES + 1) if of.k % (parts * LANES) == 0] or [of.k]
  sizes = [
    [size for size in own if of.allows(dim, size)] for dim, own in enumerate((_sizes(of.m), summed, _sizes(of.n)))
  ]
  return [Blocks(*found) for found in itertools.product(*sizes)]


def _wide(size: int) -> int:
  """Rows or columns that the matrix unit is busy for."""
  return -(-size // WIDTH) * WIDTH


def _sizes(size: int) -> list[int]:
  return [block for block in SIZES if block < size] + ([size] if size <= SIZES[0] or size % LANES else [])
