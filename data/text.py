"""Text files and JSONL -> documents, as a stream: no file is ever held whole in memory."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Literal

from data.errors import DataError

Documents = Literal['file', 'paragraph', 'line']
JSONL = ('.jsonl', '.ndjson')
SEGMENT_BYTES = 2**18


@dataclasses.dataclass(frozen=True)
class Segment:
  """A stretch of a document, ended where `last`; `num_bytes` of the file were read for it."""

  text: str
  last: bool
  num_bytes: int


def read_segments(path: pathlib.Path, documents: Documents, field: str) -> Iterator[Segment]:
  """The documents of a file, long ones in several segments.

  JSONL (by suffix) has one document to a line, in `field`. In a text a document is the file, or what lies between
  blank lines, or a line. Raises DataError for a file that is missing, empty, no UTF-8 (with the byte), or a JSONL line
  without `field` (with the line).
  """
  if path.suffix in JSONL:
    segments = _jsonl(path, field)
  else:
    segments = _whole_file(path) if documents == 'file' else _parts(path, documents)
  empty = True
  for segment in segments:
    empty &= not segment.text.strip()
    yield segment
  if empty:
    raise DataError(f'{path} is empty; remove it from the inputs.')


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str, int]]:
  """(number, text, bytes) of each line. Raises DataError at the first byte that is no text."""
  offset = 0
  try:
    with path.open('rb') as file:
      for number, line in enumerate(file, 1):
        yield number, _decode(path, line, offset), len(line)
        offset += len(line)
  except OSError as error:
    raise DataError(f'{path} cannot be read ({error.strerror}); check the path.') from error


def _decode(path: pathlib.Path, line: bytes, offset: int) -> str:
  try:
    text = line.decode('utf-8')
  except UnicodeDecodeError as error:
    where = f'{path} is not UTF-8 text (byte {offset + error.start})'
    raise DataError(f'{where}; convert it, e.g. with iconv, or leave it out.') from error
  if '\0' in text:
    raise DataError(f'{path} is binary (a NUL at byte {offset + line.index(0)}); give text or .jsonl files.')
  return text


def _jsonl(path: pathlib.Path, field: str) -> Iterator[Segment]:
  for number, line, size in _lines(path):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise DataError(f'{path}:{number}: not JSON ({error}); each line must be one object.') from error
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
      keys = ', '.join(value) if isinstance(value, dict) else type(value).__name__
      raise DataError(f'{path}:{number}: no text in field {field!r} (found: {keys}); name it with --field=.')
    yield Segment(text, True, size)


def _whole_file(path: pathlib.Path) -> Iterator[Segment]:
  held, size = [], 0
  for _, line, count in _lines(path):
    if size >= SEGMENT_BYTES:
      yield Segment(''.join(held), False, size)
      held, size = [], 0
    held.append(line)
    size += count
  yield Segment(''.join(held), True, size)


def _parts(path: pathlib.Path, documents: Documents) -> Iterator[Segment]:
  held, size = [], 0
  for _, line, count in _lines(path):
    size += count
    if line.strip():
      held.append(line)
    if held and (documents == 'line' or not line.strip()):
      yield Segment(''.join(held), True, size)
      held, size = [], 0
  if held:
    yield Segment(''.join(held), True, size)


def sample(texts: Iterable[str], total_bytes: int, budget: int) -> Iterator[str]:
  """About `budget` of `total_bytes` bytes of texts, taken evenly all along."""
  share, due = min(budget / max(total_bytes, 1), 1.0), 0.0
  for text in texts:
    due += share * len(text)
    if due >= len(text) / 2:
      due -= len(text)
      yield text
