"""Input files as streams of unpacked bytes or of records; at most a block or a group of rows is in memory.

kinds.py decides what a file is. gzip and zstd are unpacked; Parquet and ArrayRecord contain records; other files are
text or JSONL (`text.py`). Libraries that are not part of a plain installation are imported only when needed.
"""

import dataclasses
import functools
import importlib
import io
import json
import pathlib
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from data.errors import DataError
from data.prepare.kinds import HEAD_BYTES, check_kind, kind_of
from data.stores.paths import plain_path

Records = Literal['text', 'json']
BLOCK_BYTES = 2**16
_ROWS = 256


@dataclasses.dataclass
class Meter:
  """How many of the `total` bytes of the input files have been read."""

  total: int
  read: int = 0

  @property
  def fraction(self) -> float:
    return self.read / max(self.total, 1)


def optional(name: str, path: pathlib.Path) -> types.ModuleType:
  """A module from the optional dependencies `data`. Raises DataError if it is not installed."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    package = name.split('.')[0]
    raise DataError(f"{path} needs {package}, which is not installed; pip install -e '.[data]'.") from error


class _Metered(io.RawIOBase):
  """A file that adds the number of bytes read to a meter."""

  def __init__(self, path: pathlib.Path, meter: Meter):
    self._file, self._meter = path.open('rb', buffering=0), meter

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    count = self._file.readinto(buffer)
    self._meter.read += count
    return count

  def close(self) -> None:
    self._file.close()
    super().close()


class _Unpacked(io.RawIOBase):
  """The unpacked bytes of a compressed file of one or more members. Raises DataError if it is damaged or truncated."""

  def __init__(self, path: pathlib.Path, packed: io.RawIOBase, start: Callable[[], Any], errors: type[Exception]):
    self._path, self._packed, self._start, self._errors = path, packed, start, errors
    self._member: Any = None  # a decompressor, None between members
    self._rest = self._out = b''  # compressed and unpacked bytes that have not been used yet

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._out and self._unpack():
      pass
    count = min(len(buffer), len(self._out))
    buffer[:count], self._out = self._out[:count], self._out[count:]
    return count

  def _unpack(self) -> bool:
    """Unpacks a block; False at the end of the file."""
    block, self._rest = self._rest or self._packed.read(BLOCK_BYTES), b''
    if not block:
      if self._member is not None:
        raise self._cut_off()
      return False
    self._member = self._member or self._start()
    try:
      self._out = self._member.decompress(block)
    except self._errors as error:
      raise DataError(f'{self._path} cannot be unpacked ({error}); copy it again.') from error
    if self._member.eof:
      self._rest, self._member = self._member.unused_data, None
      return self._has_more()
    return True

  def _has_more(self) -> bool:
    """Whether the file may continue after the end of a member."""
    return True

  def _cut_off(self) -> DataError:
    return DataError(f'{self._path} is cut off in the middle of its compressed data; copy it again.')

  def close(self) -> None:
    self._packed.close()
    super().close()


class _Gzip(_Unpacked):
  """A gzip file, read as `gzip -dc` reads it: zeros after the last member are padding, other bytes are ignored with a
  warning."""

  def __init__(self, path: pathlib.Path, packed: io.RawIOBase):
    super().__init__(path, packed, lambda: zlib.decompressobj(31), zlib.error)

  def _has_more(self) -> bool:
    while len(self._rest) < 2 and (block := self._packed.read(BLOCK_BYTES)):
      self._rest += block
    if not self._rest or self._rest.startswith(b'\x1f\x8b'):
      return True
    if len(self._rest) == 1 and self._rest != b'\0':  # gzip reads two bytes here and reports a single one as cut off
      raise self._cut_off()
    self._skip()
    return True

  def _skip(self) -> None:
    """Reads the rest of the file, which is not a gzip member."""
    count, padding = 0, self._rest.startswith(b'\0')
    while block := self._rest or self._packed.read(BLOCK_BYTES):
      count, padding, self._rest = count + len(block), padding and not block.strip(b'\0'), b''
    if not padding:
      _warn(f'{self._path}: {count} bytes after its compressed data are ignored, as gzip -dc does.')


@functools.cache
def _warn(line: str) -> None:
  """Prints a warning once: files are read twice if a tokenizer is trained."""
  print(f'warning: {line}', file=sys.stderr)


def open_bytes(path: pathlib.Path, meter: Meter) -> io.BufferedReader:
  """Opens a file, unpacking it if its name says that it is compressed. Raises DataError if it cannot be read."""
  packing = kind_of(path).packing
  zstandard = optional('zstandard', path) if packing == 'zstd' else None
  try:
    raw = _Metered(path, meter)
  except OSError as error:
    raise DataError(f'{path} cannot be read ({error.strerror}); check the path.') from error
  if packing == 'gzip':
    raw = _Gzip(path, raw)
  elif zstandard:
    raw = _Unpacked(path, raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
  return io.BufferedReader(raw, BLOCK_BYTES)


def check_file(path: pathlib.Path) -> None:
  """Raises DataError, with the fix, if a file's contents do not match its name or its kind is not supported."""
  try:
    with path.open('rb') as file:
      head = file.read(HEAD_BYTES)
    check_kind(path, head, lambda: _unpacked_head(path))
  except OSError as error:
    raise DataError(f'{path} cannot be read ({error.strerror}); check the path.') from error


def _unpacked_head(path: pathlib.Path) -> bytes:
  with open_bytes(path, Meter(0)) as file:
    return file.read(HEAD_BYTES)


def not_text(where: str, place: int) -> DataError:
  return DataError(f'{where} is not UTF-8 text (byte {place}); convert it, e.g. with iconv, or leave it out.')


def array_records(path: pathlib.Path, records: Records, meter: Meter) -> Iterator[tuple[str, Any]]:
  """Yields (where, text or JSON value) of each record. Raises DataError for an invalid file or record."""
  reader = _array_record_reader(path)
  size, count = path.stat().st_size, reader.num_records()
  for first in range(0, count, _ROWS):
    last = min(first + _ROWS, count)
    try:
      found = reader.read(list(range(first, last)))
    except (RuntimeError, ValueError, IndexError) as error:
      raise DataError(f'{path} cannot be read from record {first} on ({first_line(error)}); copy it again.') from error
    meter.read += size * (last - first) // count
    for number, raw in enumerate(found, first):
      yield f'{path}: record {number}', _record(f'{path}: record {number}', raw, records)
  reader.close()


def _array_record_reader(path: pathlib.Path):
  module = optional('array_record.python.array_record_module', path)
  try:
    reader = module.ArrayRecordReader(plain_path(str(path)))
  except (RuntimeError, ValueError) as error:
    raise DataError(f'{path} cannot be read as ArrayRecord ({first_line(error)}); copy it again.') from error
  if not reader.ok():
    raise DataError(f'{path} cannot be read as ArrayRecord; copy it again.')
  return reader


def _record(where: str, raw: bytes, records: Records) -> Any:
  text = decode(where, raw, 0)
  return text if records == 'text' else parse_json(where, text)


def decode(where: str, raw: bytes, offset: int) -> str:
  """UTF-8 bytes -> text. `raw` begins at byte `offset` of its file. Raises DataError, naming the first invalid byte."""
  try:
    text = raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise not_text(where, offset + error.start) from error
  if '\0' in text:
    raise DataError(f'{where} is binary (a NUL at byte {offset + raw.index(0)}); give text or .jsonl files.')
  return text


def check_text(what: str, text: str) -> None:
  """Raises DataError for a NUL or half of a surrogate pair, which JSON can escape but UTF-8 cannot encode."""
  if '\0' in text:
    raise DataError(f'{what} has a NUL (character {text.index(chr(0))}); correct its text.')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    half = ascii(text[error.start])[1:-1]
    raise DataError(
      f'{what} has half of a surrogate pair ({half}), which is not a character; correct its text.'
    ) from error


def parse_json(where: str, text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:  # RecursionError: a value that is nested too deeply
    raise DataError(f'{where}: not JSON ({error}); each line must be one object.') from error


def first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
