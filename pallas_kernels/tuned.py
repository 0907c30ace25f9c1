"""Block sizes that `scripts/tune_kernels.py` found: tuning/CHIP.json. Nothing is tuned at import or inside jit."""

import functools
import json
import logging
import pathlib

import jax

from pallas_kernels.errors import KernelError

FOLDER = pathlib.Path(__file__).parent / 'tuning'
# Part of the name that jax gives a device -> its file; the first match counts.
CHIPS = {
  'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p', 'TPU v6': 'v6e', 'TPU7x': 'tpu7x', 'TPU v7x': 'tpu7x',
  'H100': 'h100', 'H200': 'h200', 'A100': 'a100',
}  # fmt: skip


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
  kind = device_kind()
  chip = chip_of(kind)
  if chip is None or not (FOLDER / f'{chip}.json').exists():
    _missing(op, shape, kind, chip)
    return None
  entry = _read(FOLDER / f'{chip}.json').get(op, {}).get(shape)
  if entry is None:
    _missing(op, shape, kind, chip)
    return None
  sizes = {name: entry.get(name) for name in names} if isinstance(entry, dict) else {}
  if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
    raise _damaged(FOLDER / f'{chip}.json', f'{op}.{shape} = {entry!r} lacks one of {", ".join(names)}')
  return sizes


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
    f'tuned blocks in {path} are damaged ({reason}); write them again with scripts/tune_kernels.py, or delete the file '
    'for the default blocks.'
  )


@functools.cache
def _missing(op: str, shape: str, kind: str | None, chip: str | None) -> None:
  logging.getLogger(__name__).info(
    '%s: no tuned blocks for %s on %s, the default ones are used; scripts/tune_kernels.py finds them%s.',
    op, shape, kind, '' if chip else ' for chips in pallas_kernels/tuned.py',
  )  # fmt: skip
