"""Files in the safetensors format: 8 bytes with the header's length, a JSON header, then the raw values.

Source: github.com/huggingface/safetensors, README, "Format". Values are read in parts, so a
tensor costs no memory before it is used. docs/design/0017-safetensors-without-the-package.md gives the reason for this
module.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from pretrain.errors import CheckpointError

READ = {'F32': np.dtype(np.float32), 'BF16': np.dtype(ml_dtypes.bfloat16), 'F16': np.dtype(np.float16)}
WORDS = {'I32': np.dtype(np.int32), 'I64': np.dtype(np.int64)}  # of packed weights, and their shapes
# Types of tensors that a model does not read (masks and counters in old files).
SIZES = {name: dtype.itemsize for name, dtype in READ.items()} | {
  'F64': 8, 'I64': 8, 'U64': 8, 'I32': 4, 'U32': 4, 'I16': 2, 'U16': 2, 'I8': 1, 'U8': 1, 'BOOL': 1, 'F8_E4M3': 1,
  'F8_E5M2': 1,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # the limit of the reference implementation
SHARD_BYTES = 5_000_000_000
COMPARED = 8 * 2**20  # elements at a time
INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file. `begin` counts bytes from the start of the file."""

  path: pathlib.Path
  name: str
  dtype: str
  shape: tuple[int, ...]
  begin: int

  @property
  def size(self) -> int:
    return math.prod(self.shape) * SIZES[self.dtype]

  def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Elements `begin` to `end` of its values in a row, copied: mapped pages would count as memory of the process.

    Raises CheckpointError for a type that is no weight's.
    """
    if self.dtype not in READ:
      raise _damage(self.path, f'{self.name} has type {self.dtype}; weights are {", ".join(READ)}', 'convert it')
    return self.raw(begin, end)

  def raw(self, begin: int = 0, end: int | None = None) -> np.ndarray:
    """The same, also of integers."""
    count, size = (math.prod(self.shape) if end is None else end) - begin, SIZES[self.dtype]
    raw = np.fromfile(self.path, np.uint8, count * size, offset=self.begin + begin * size)
    return raw.view((READ | WORDS)[self.dtype])

  def write(self, begin: int, values: np.ndarray) -> None:
    """Puts `values`, in a row, at element `begin` of the file. Mapped pages would count as memory of the process."""
    with self.path.open('r+b', buffering=0) as file:
      file.seek(self.begin + begin * SIZES[self.dtype])
      left = memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1))
      while left:  # a call writes at most 2 GB
        left = left[file.write(left) :]

  def values(self) -> np.ndarray:
    """All of its values."""
    return self.read().reshape(self.shape)


def equal(a: Tensor, b: Tensor) -> bool:
  """Whether both have the same type, shape and bits."""
  if a is b or (a.dtype, a.shape) != (b.dtype, b.shape):
    return a is b
  count = math.prod(a.shape)
  parts = ((at, min(at + COMPARED, count)) for at in range(0, count, COMPARED))
  return all(np.array_equal(a.read(*part).view(np.uint8), b.read(*part).view(np.uint8)) for part in parts)


def _mapped(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...], begin: int) -> np.ndarray:
  if not math.prod(shape):  # nothing cannot be mapped
    return np.zeros(shape, dtype)
  raw = np.memmap(path, np.uint8, 'r+', begin, (math.prod(shape) * dtype.itemsize,))
  return raw.view(dtype).reshape(shape)


def not_finite(tensor: Tensor, values: np.ndarray, begin: int) -> CheckpointError:
  """The error for `values`, elements of `tensor` from `begin`, that are not all finite."""
  wrong = np.flatnonzero(~np.isfinite(values))
  what = f'element {begin + wrong[0]} of {tensor.name} is {values[wrong[0]]}'
  return _damage(tensor.path, f'{what}, and weights are finite', 'copy or download the file again, or repair it')


def _damage(path: pathlib.Path, what: str, fix: str = 'copy or download the file again') -> CheckpointError:
  return CheckpointError('IMPORT', f'{path}: {what}. Nothing was written; {fix}.')


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """Every tensor of the weights in `folder`, in one file or in shards. Raises CheckpointError for damaged files."""
  if (folder / INDEX).exists():
    return _open_shards(folder)
  if (folder / SINGLE).exists():
    return open_file(folder / SINGLE)
  others = sorted(path.name for path in folder.glob('*.bin')) if folder.is_dir() else []
  there = f' (it has {others[0]}, which is not read: loading it can run code)' if others else ''
  raise CheckpointError(
    'IMPORT',
    f'{folder} has no {SINGLE} and no {INDEX}{there}. Nothing was written; write the weights there with '
    'save_pretrained(…, safe_serialization=True).',
  )


def _open_shards(folder: pathlib.Path) -> dict[str, Tensor]:
  path = folder / INDEX
  try:
    places = json.loads(path.read_text())['weight_map']
    files = {str(name) for name in places.values()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _damage(path, 'it is no index of shards ("weight_map" is missing or not readable)') from error
  if outside := [name for name in sorted(files) if pathlib.PurePath(name).name != name]:
    raise _damage(path, f'the shard {outside[0]!r} is not a file beside it')
  if absent := [name for name in sorted(files) if not (folder / name).is_file()]:
    raise _damage(path, f'the shard {absent[0]} is missing ({len(absent)} of {len(files)} are)')
  found = {name: open_file(folder / name) for name in sorted(files)}
  if lost := [name for name, file in places.items() if name not in found[file]]:
    raise _damage(folder / places[lost[0]], f'it does not have {lost[0]}, which {INDEX} places there')
  if more := [(file, name) for file, own in found.items() for name in own if places.get(name) != file]:
    file, name = more[0]
    where = f'places in {places[name]}' if name in places else 'does not list'
    raise _damage(folder / file, f'it has {name}, which {INDEX} {where} (first of {len(more)})')
  return {name: found[file][name] for name, file in places.items()}


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file. Raises CheckpointError unless they fill the file exactly, without overlap."""
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
      raise _damage(path, f'it has {size} bytes, which is too short for its header (truncated, or not safetensors)')
    text = file.read(length)
  try:
    header = json.loads(text)
    header.pop('__metadata__', None)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _damage(path, f'its header is not readable ({error})') from error
  _check_fills(path, tensors, 8 + length, size)
  return {tensor.name: tensor for tensor in tensors}


def _tensor(path: pathlib.Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
  shape, (begin, end) = tuple(entry['shape']), entry['data_offsets']
  if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
    raise ValueError(f'{name} has shape {list(shape)} at bytes {begin} to {end}')
  if entry['dtype'] not in SIZES:
    raise ValueError(f'{name} has the unknown type {entry["dtype"]!r}')
  tensor = Tensor(path, name, entry['dtype'], shape, start + begin)
  if tensor.size != end - begin:
    raise ValueError(f'{name}, {tensor.dtype}{list(shape)}, needs {tensor.size} bytes and has {end - begin}')
  return tensor


def _check_fills(path: pathlib.Path, tensors: list[Tensor], start: int, size: int) -> None:
  at = start
  for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.size)):
    if tensor.begin != at:
      what = 'overlaps the tensor before it' if tensor.begin < at else 'does not follow the tensor before it'
      raise _damage(path, f'{tensor.name} {what}')
    at += tensor.size
  if at != size:
    what = f'it has {size} bytes, and its tensors need {at}'
    raise _damage(path, what + (' (truncated)' if size < at else ''))


def create(
  folder: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], limit: int = SHARD_BYTES
) -> dict[str, np.ndarray]:
  """As `allocate`, but each value is an array that writes to the disk: for tensors that fit into memory."""
  made = allocate(folder, tensors, limit)
  return {name: _mapped(t.path, READ[t.dtype], t.shape, t.begin) for name, t in made.items()}


def allocate(
  folder: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], limit: int = SHARD_BYTES
) -> dict[str, Tensor]:
  """Files for tensors of these types and shapes, with zeros as values.

  One file up to `limit` bytes, else shards and their index. The bytes are those that `save_pretrained` would write:
  larger types first, then by name.
  """
  names = sorted(tensors, key=lambda name: (-SIZES[tensors[name][0]], name))
  shards = _split({name: _bytes(*tensors[name]) for name in names}, limit)
  files = [SINGLE] if len(shards) == 1 else [
    f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)
  ]  # fmt: skip
  made: dict[str, Tensor] = {}
  for file, shard in zip(files, shards, strict=True):
    made |= _create_file(folder / file, {name: tensors[name] for name in shard})
  if len(shards) > 1:
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(_bytes(*tensors[name]) for name in names)
    text = json.dumps({'metadata': {'total_size': total}, 'weight_map': dict(sorted(places.items()))}, indent=2)
    (folder / INDEX).write_text(text + '\n')
  return made


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
  return math.prod(shape) * SIZES[dtype]


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
  """Names in their order, in groups of at most `limit` bytes; a larger tensor has a group of its own.

  >>> _split({'a': 3, 'b': 3, 'c': 9, 'd': 1}, 6)
  [['a', 'b'], ['c'], ['d']]
  """
  shards, used = [[]], 0
  for name, size in sizes.items():
    if shards[-1] and used + size > limit:
      shards, used = [*shards, []], 0
    shards[-1].append(name)
    used += size
  return shards


def _create_file(path: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  at = 0
  for name, (dtype, shape) in tensors.items():
    header[name] = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [at, at := at + _bytes(dtype, shape)]}
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    file.truncate(8 + len(text) + at)
  start = {name: 8 + len(text) + entry['data_offsets'][0] for name, entry in header.items() if name in tensors}
  return {name: Tensor(path, name, dtype, shape, start[name]) for name, (dtype, shape) in tensors.items()}
