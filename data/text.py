"""Text files and JSONL -> documents, as a stream: no more than a few segments are in memory at once.

A line of JSONL is the exception: it is one JSON value, and held whole.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from data.errors import DataError

Documents = Literal['file', 'paragraph', 'line']
JSONL = ('.jsonl', '.ndjson', '.json')  # C4's files are named .json
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
  blank lines, or a line. A segment of it ends at the end of a line where one comes within SEGMENT_BYTES, otherwise at
  white space (or, in as long a stretch without any, between two characters): however it is cut, it is one document.
  Raises DataError for a file that is missing, empty, no UTF-8 (with the byte), or a JSONL line without `field` (with
  the line).
  """
  if path.suffix in JSONL:
    return _not_empty(path, _jsonl(path, field))
  return _not_empty(path, _whole_file(path) if documents == 'file' else _parts(path, documents))


def read_pairs(path: pathlib.Path, inputs_field: str, targets_field: str) -> Iterator[Segment]:
  """The pairs of a JSONL file: for each line two documents, its inputs, then its targets.

  Inputs may be empty. Raises DataError as `read_segments`, for empty targets and for a file that is no .jsonl.
  """
  if path.suffix not in JSONL:
    raise DataError(f'{path} is no .jsonl file, and only those hold pairs (--inputs_field, --targets_field).')
  return _not_empty(path, _pairs(path, inputs_field, targets_field))


def _not_empty(path: pathlib.Path, segments: Iterable[Segment]) -> Iterator[Segment]:
  empty = True
  for segment in segments:
    empty &= not segment.text.strip()
    yield segment
  if empty:
    raise DataError(f'{path} is empty; remove it from the inputs.')


class _Piece(NamedTuple):
  """A line, or a part of a long one, of `num_bytes`; `ends` says that the line does."""

  text: str
  num_bytes: int
  ends: bool


def _pieces(path: pathlib.Path, longest: int) -> Iterator[_Piece]:
  """The lines of a file, in pieces of at most `longest` bytes. Raises DataError at the first byte that is no text."""
  offset, rest = 0, b''
  try:
    with path.open('rb') as file:
      while block := rest + file.readline(longest - len(rest)):
        ends = len(block) < longest or block.endswith(b'\n')
        cut = len(block) if ends else _place_to_cut(block)
        yield _Piece(_decode(path, block[:cut], offset), cut, ends)
        offset, rest = offset + cut, block[cut:]
  except OSError as error:
    raise DataError(f'{path} cannot be read ({error.strerror}); check the path.') from error


def _place_to_cut(block: bytes) -> int:
  """Behind the last white space; where there is none, before the last character (it may be cut off)."""
  if (space := max(block.rfind(white) for white in b' \t\r')) >= 0:
    return space + 1
  for place in range(len(block) - 1, max(len(block) - 5, 0), -1):
    if block[place] & 0xC0 != 0x80:  # no continuation byte: a character begins
      return place
  return len(block)


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
  for where, value, size in _lines(path):
    yield Segment(_text(value, field, where, '--field'), True, size)


def _pairs(path: pathlib.Path, inputs_field: str, targets_field: str) -> Iterator[Segment]:
  for where, value, size in _lines(path):
    inputs = _text(value, inputs_field, where, '--inputs_field')
    targets = _text(value, targets_field, where, '--targets_field')
    if not targets.strip():
      raise DataError(f'{where}: field {targets_field!r} is empty; write what is to be learnt, or leave out the line.')
    yield Segment(inputs, True, size)
    yield Segment(targets, True, 0)


def _lines(path: pathlib.Path) -> Iterator[tuple[str, Any, int]]:
  """(file:line, JSON value, bytes) of each line that is not blank."""
  for number, (line, size, _) in enumerate(_pieces(path, sys.maxsize), 1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise DataError(f'{path}:{number}: not JSON ({error}); each line must be one object.') from error
    yield f'{path}:{number}', value, size


def _text(value: Any, field: str, where: str, flag: str) -> str:
  """The text of a field. Half of a surrogate pair, which JSON can escape and UTF-8 cannot hold, is a DataError too."""
  text = value.get(field) if isinstance(value, dict) else None
  if not isinstance(text, str):
    keys = ', '.join(value) if isinstance(value, dict) else type(value).__name__
    raise DataError(f'{where}: no text in field {field!r} (found: {keys}); name it with {flag}=.')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    half = ascii(text[error.start])[1:-1]
    raise DataError(
      f'{where}: field {field!r} has half of a surrogate pair ({half}), which is no character; correct its text.'
    ) from error
  return text


def _whole_file(path: pathlib.Path) -> Iterator[Segment]:
  held, size = [], 0
  for text, count, _ in _pieces(path, SEGMENT_BYTES):
    if size >= SEGMENT_BYTES:
      yield Segment(''.join(held), False, size)
      held, size = [], 0
    held.append(text)
    size += count
  yield Segment(''.join(held), True, size)


def _parts(path: pathlib.Path, documents: Documents) -> Iterator[Segment]:
  held, size, blank = [], 0, True  # blank: nothing yet on this line
  for text, count, ends in _pieces(path, SEGMENT_BYTES):
    blank = blank and not text.strip()
    if held and not blank and size >= SEGMENT_BYTES:
      yield Segment(''.join(held), False, size)
      held, size = [], 0
    size += count
    if not blank:
      held.append(text)
    if held and ends and (documents == 'line' or blank):
      yield Segment(''.join(held), True, size)
      held, size = [], 0
    blank = blank or ends
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
