"""Checkpoints of T5X: a msgpack file `checkpoint`, whose leaves are small arrays or name zarr folders beside it.

Source: github.com/google-research/t5x, t5x/checkpoints.py, version 3. Arrays are read in boxes, so an array costs no
memory before it is used.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from flax import serialization

from data.stores.paths import looked_in
from pretrain.errors import CheckpointError

FILE = 'checkpoint'
TARGET = 'target'  # the parameters; the other parts are the optimizer's state and the model's mutable variables
TYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
ZARR = {'<f4': 'float32', '<f2': 'float16'}  # names of types in .zarray; bfloat16 has its own name there
LISTED = 8


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a checkpoint. `chunks` is the shape of the parts that are decompressed at once."""

  path: pathlib.Path
  name: str
  dtype: str
  shape: tuple[int, ...]
  chunks: tuple[int, ...]
  values: Any  # a numpy array, or a TensorStore

  def read(self, box: tuple[slice, ...]) -> np.ndarray:
    """The values in a box. Raises CheckpointError for a damaged chunk."""
    if isinstance(self.values, np.ndarray):
      return self.values[box]
    try:
      return self.values[box].read().result()
    except (ValueError, KeyError, OSError, RuntimeError) as error:
      reason = str(error).splitlines()[0].partition(' [')[0]
      raise damaged(self.path, f'it cannot be read ({reason})') from error


def damaged(path: pathlib.Path, what: str, fix: str = 'copy or download it again') -> CheckpointError:
  return CheckpointError('IMPORT', f'{path}: {what}. Nothing was written; {fix}.')


def checkpoint_in(folder: pathlib.Path) -> pathlib.Path | None:
  """The checkpoint that `folder` is or has; None if there is none. Raises CheckpointError where there are several."""
  if (folder / FILE).is_file():
    return folder
  found = sorted(path.parent for path in folder.glob(f'checkpoint_*/{FILE}'))
  if len(found) > 1:
    names = ', '.join(path.name for path in found)
    raise CheckpointError('IMPORT', f'{folder} has {names}. Nothing was written; name one of them with --from.')
  return found[0] if found else None


def open_checkpoint(folder: pathlib.Path) -> tuple[dict[str, Array], list[str]]:
  """(each array of the parameters by its name in dots, names of the parts that are left out).

  Raises CheckpointError, which lists what is wrong, for damaged files and for chunks that are missing.
  """
  tree = _read_msgpack(folder / FILE)
  target = tree.get(TARGET)
  if not isinstance(target, dict) or not target:
    raise damaged(folder / FILE, f'it has no "{TARGET}" with parameters', 'choose a checkpoint of T5X (version 3)')
  arrays, problems = {}, []
  for name, leaf in _leaves(target, TARGET):
    try:
      arrays[name] = _small(folder, name, leaf) if isinstance(leaf, np.ndarray) else _open(folder, name, leaf)
    except (ValueError, KeyError, TypeError, OSError) as error:
      problems.append(f'{name} ({_reason(error)})')
  if problems:
    more = f' and {len(problems) - LISTED} more' if len(problems) > LISTED else ''
    raise damaged(folder, f'these arrays cannot be read: {", ".join(problems[:LISTED])}{more}', 'copy the folder again')
  return arrays, sorted(tree.keys() - {TARGET})


def _reason(error: Exception) -> str:
  return f'{error} is absent' if isinstance(error, KeyError) else str(error).splitlines()[0].partition(' [source')[0]


def _read_msgpack(path: pathlib.Path) -> dict[str, Any]:
  """The object of the file; its arrays are placeholders or small. Flax reads it, and runs no code of it."""
  try:
    tree = serialization.msgpack_restore(path.read_bytes())
  except Exception as error:  # msgpack's errors have no common base but this
    what = f'it is not a msgpack file of Flax ({type(error).__name__}: {str(error)[:80]})'
    raise damaged(path, what, 'checkpoints of TensorFlow are not read; copy or convert it again') from error
  tree = tree.get('optimizer', tree) if isinstance(tree, dict) else None
  if not isinstance(tree, dict):
    raise damaged(path, 'it holds no object')
  return tree


def _leaves(tree: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, dict) and not value.keys() >= {'driver', 'kvstore', 'metadata'}:
      yield from _leaves(value, f'{name}.{key}')
    elif value is not None:
      yield f'{name}.{key}', value


def _small(folder: pathlib.Path, name: str, values: np.ndarray) -> Array:
  kind = TYPES.get(values.dtype.name, values.dtype.name)
  return Array(folder / FILE, name, kind, values.shape, tuple(max(1, n) for n in values.shape), values)


def _open(folder: pathlib.Path, name: str, leaf: Any) -> Array:
  """The zarr folder that a placeholder names. Raises ValueError, KeyError, TypeError or OSError, with the reason."""
  if not isinstance(leaf, dict):
    raise ValueError(f'it is {type(leaf).__name__} and no array')
  if leaf['driver'] != 'zarr':
    raise ValueError(f'driver {leaf["driver"]!r}; zarr is read')
  file = str(leaf['kvstore'].get('path') or leaf['path']).rstrip('/')  # older TensorStores wrote it outside
  if pathlib.PurePath(file).name != file or file == '..':
    raise ValueError(f'its path {file!r} is not a folder beside {FILE}')
  path = folder / file
  if not (path / '.zarray').is_file():
    raise ValueError(f'the folder {file}{looked_in(path)} has no .zarray')
  found = json.loads((path / '.zarray').read_text())
  shape, chunks = tuple(found['shape']), tuple(found['chunks'])
  if list(shape) != list(leaf['metadata']['shape']):
    raise ValueError(f'{list(shape)} in {file}/.zarray, {list(leaf["metadata"]["shape"])} in {FILE}')
  _check_chunks(path, shape, chunks, found.get('dimension_separator', '.'))
  store = ts.open({'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{path}/'}}, open=True, read=True).result()
  kind = ZARR.get(found['dtype'], found['dtype'])
  return Array(path, name, TYPES.get(kind, kind), shape, chunks, store)


def _check_chunks(path: pathlib.Path, shape: tuple[int, ...], chunks: tuple[int, ...], separator: str) -> None:
  """Raises ValueError where a chunk is missing: TensorStore would read it as zeros."""
  if len(shape) != len(chunks) or not all(type(n) is int and n >= 1 for n in (*shape, *chunks)):
    raise ValueError(f'shape {list(shape)} in chunks of {list(chunks)}')
  counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
  there = sum(1 for file in path.rglob('*') if file.name != '.zarray' and file.is_file())
  if there < math.prod(counts):
    raise ValueError(f'{math.prod(counts) - there} of {math.prod(counts)} chunks are missing')
  names = (separator.join(map(str, at)) or '0' for at in np.ndindex(*counts))
  if lost := [name for name in names if not (path / name).is_file()]:
    raise ValueError(f'chunk {lost[0]} is missing ({len(lost)} of {math.prod(counts)} are)')
