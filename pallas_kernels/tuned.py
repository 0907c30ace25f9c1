"""What `scripts/tune_kernels.py` and `scripts/bench/matmul.py` found for each chip: tuning/CHIP.json.

Nothing is tuned at import or inside jit.
"""

import functools
import json
import logging
import math
import pathlib
from collections.abc import Collection

import jax

from pallas_kernels.errors import KernelError

FOLDER = pathlib.Path(__file__).parent / 'tuning'
# Part of the name that jax gives a device -> its file; the first match counts.
CHIPS = {
  'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p', 'TPU v6': 'v6e', 'TPU7x': 'tpu7x', 'TPU v7x': 'tpu7x',
  'H100': 'h100', 'H200': 'h200', 'A100': 'a100',
}  # fmt: skip
FAR = 8  # an entry counts for shapes whose sizes are at most so many times smaller or larger than its own
# op -> the program that writes its entries.
WRITERS = {'attention': 'scripts/tune_kernels.py', 'quantized_matmul': 'scripts/bench/matmul.py --aot --write'}


def device_kind() -> str | None:
  """The device of the mesh in use, which this process may not have; None without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.device_kind


def chip_of(kind: str | None) -> str | None:
  return next((chip for part, chip in CHIPS.items() if kind is not None and part in kind), None)


def lookup(op: str, shape: str, names: tuple[str, ...]) -> dict[str, int] | None:
  """The sizes `names` of `op` for this chip and class of shapes; None if they are not tuned, which is logged once.

  Raises KernelError for a damaged file.
  """
  path, entries = _entries(op)
  if shape not in entries:
    _missing(op, shape, device_kind())
    return None
  entry = entries[shape]
  sizes = {name: entry.get(name) for name in names} if isinstance(entry, dict) else {}
  if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
    raise _damaged(path, f'{op}.{shape} = {entry!r} lacks one of {", ".join(names)}')
  return sizes


def fastest(op: str, kind: str, sizes: tuple[int, ...], known: Collection[str]) -> str | None:
  """The fastest implementation of those in `known`, from the entry of this chip and `kind` with the closest shape.

  The distance of two shapes is the sum of the squared logarithms of the ratios of their sizes. Returns None, and logs
  one line, if the file has no entry of this kind, or none whose sizes are all within a factor of `FAR`.

  Raises KernelError for a damaged file.
  """
  path, entries = _entries(op)
  found, is_known = {}, False
  for key, entry in entries.items():
    own, _, shape = key.rpartition('_')
    if own != kind:
      continue
    if not isinstance(entry, dict) or entry.get('implementation') not in known or not _is_shape(shape, len(sizes)):
      raise _damaged(path, f'{op}.{key} = {entry!r} lacks one of {", ".join(known)}, or a shape')
    ratios = [max(int(size) / n, n / int(size)) for size, n in zip(shape.split('x'), sizes, strict=True)]
    is_known = True
    if max(ratios) <= FAR:
      found[sum(math.log(ratio) ** 2 for ratio in ratios)] = entry['implementation']
  if not found:
    near = f' within a factor of {FAR} of {"x".join(map(str, sizes))}' if is_known else ''
    _missing(op, kind + near, device_kind())
    return None
  return found[min(found)]


def _is_shape(text: str, dims: int) -> bool:
  parts = text.split('x')
  return len(parts) == dims and all(part.isdecimal() and int(part) > 0 for part in parts)


def _entries(op: str) -> tuple[pathlib.Path, dict]:
  """The path of this chip's file, and its entries for `op`: empty if the file does not exist."""
  path = FOLDER / f'{chip_of(device_kind())}.json'
  return path, _read(path).get(op, {}) if path.exists() else {}


@functools.cache
def _read(path: pathlib.Path) -> dict:
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise _damaged(path, str(error)) from error
  if not isinstance(found, dict):
    raise _damaged(path, f'{type(found).__name__} at the top')
  return found


def _damaged(path: pathlib.Path, reason: str) -> KernelError:
  return KernelError(
    f'tuned entries in {path} are damaged ({reason}); write them again with {" or ".join(WRITERS.values())}, or delete '
    'the file to use the defaults.'
  )


@functools.cache
def _missing(op: str, shape: str, kind: str | None) -> None:
  logging.getLogger(__name__).info(
    '%s: no tuned entry for %s on %s, the default is used; %s finds one%s.',
    op, shape, kind, WRITERS[op], '' if chip_of(kind) else ' for chips in pallas_kernels/tuned.py',
  )  # fmt: skip
