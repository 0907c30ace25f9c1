"""Input files -> documents, as a stream: at most a few segments are in memory at once.

The exceptions are a line of JSONL and a record, which are held in memory whole.
"""

import codecs
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from data.errors import DataError
from data.prepare.inputs import (
  Meter,
  Records,
  array_records,
  check_file,
  check_text,
  decode,
  open_bytes,
  parse_json,
)
from data.prepare.kinds import kind_of
from data.prepare.messages import ROLES, empty_error, marker, turns_of
from data.prepare.parquet import parquet_rows, type_name

Documents = Literal['file', 'paragraph', 'line']
SEGMENT_BYTES = 2**18
LARGEST_SCORE = 3e38  # scores are stored as float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """What is read from files: how text is split into `documents`, and which fields of records (JSONL, Parquet, …).

  `field` is the text of a record. In its place, `pair` names the fields of inputs and targets, or `messages` the field
  of a conversation (data/prepare/messages.py), each of whose turns becomes a document. `tag_fields` are put in front of
  the text as tags; `score_field` is a number that is kept for each document. `records` is the type of the records in
  ArrayRecord files.
  """

  documents: Documents = 'file'
  field: str = 'text'
  pair: tuple[str, str] | None = None
  messages: str | None = None
  tag_fields: tuple[str, ...] = ()
  score_field: str | None = None
  records: Records = 'text'

  @property
  def columns(self) -> list[str]:
    """All fields that are read from a record."""
    scores = [self.score_field] if self.score_field else []
    return [*dict.fromkeys([*(self.units or (self.field,)), *self.tag_fields, *scores])]

  @property
  def units(self) -> tuple[str, ...]:
    """The fields of a pair or of a conversation; empty if documents are text."""
    return self.pair or ((self.messages,) if self.messages else ())


@dataclasses.dataclass(frozen=True)
class Segment:
  """A part of a document; `last` marks the document's end. `num_bytes` of the (unpacked) file were read for it.

  `tags` are put in front of the text; `score` comes from the record. A turn has a `role` (an index into
  messages.ROLES), and `turns_left` turns follow it. A text that must have tokens (a target, or an assistant's turn) has
  its location in `required`.
  """

  text: str
  last: bool
  num_bytes: int
  tags: str = ''
  score: float = 0.0
  role: int = 0
  turns_left: int = 0
  required: str = ''


def is_blank(text: str) -> bool:
  return not text.strip()


def read_segments(
  path: pathlib.Path, reading: Reading, meter: Meter | None = None, is_empty: Callable[[str], bool] = is_blank
) -> Iterator[Segment]:
  """The documents of a file; long ones come in several segments. A pair is two documents, inputs and targets; each turn
  of a conversation is one document.

  JSONL and files of records (recognised by suffix) have one document per line or record. In a text file, a document is
  the whole file, a paragraph between blank lines, or a line. A segment of it ends at the end of a line if there is one
  within SEGMENT_BYTES, otherwise at white space, otherwise between two characters; the segments form one document.
  Raises DataError for a file that is missing, empty, damaged or not UTF-8 (with the byte), and for a record that lacks
  a field (with its line or number). The inputs of a pair may be empty, its targets may not. A file is empty if all of
  its texts are (`is_empty`).
  """
  meter = meter or Meter(0)
  check_file(path)
  if (records := _records(path, reading, meter)) is not None:
    take = _pair if reading.pair else _conversation if reading.messages else _document
    return _not_empty(path, (segment for record in records for segment in take(record, reading)), is_empty)
  if fields := [
    *filter('text'.__ne__, [reading.field]),
    *reading.units,
    *reading.tag_fields,
    *filter(None, [reading.score_field]),
  ]:
    raise DataError(
      f'{path} has no field {fields[0]!r}: it is text. Fields are those of .jsonl, .parquet, .arrayrecord.'
    )
  if kind_of(path).holds == 'arrayrecord':
    found = array_records(path, 'text', meter)
    return _not_empty(path, (Segment(text, True, len(text)) for _, text in found if text.strip()), is_empty)
  parts = _whole_file(path, meter) if reading.documents == 'file' else _parts(path, reading, meter)
  return _not_empty(path, parts, is_empty)


class _Record(NamedTuple):
  """A JSON value or row, its location `where`, and its size in bytes."""

  where: str
  value: Any
  num_bytes: int


def _records(path: pathlib.Path, reading: Reading, meter: Meter) -> Iterator[_Record] | None:
  """The records of a file; None if it is text."""
  match kind_of(path).holds:
    case 'json':
      return _lines(path, meter)
    case 'parquet':
      return (_Record(where, row, _size(row)) for where, row in parquet_rows(path, reading.columns, meter))
    case 'arrayrecord' if reading.records == 'json':
      return (_Record(where, value, _size(value)) for where, value in array_records(path, 'json', meter))
  return None


def _size(value: Any) -> int:
  return sum(len(part) for part in value.values() if isinstance(part, str)) if isinstance(value, dict) else 0


def _document(record: _Record, reading: Reading) -> Iterator[Segment]:
  text = _text(record, reading.field, '--field')
  tags = ''.join(_tag(record, field) for field in reading.tag_fields)
  yield Segment(text, True, record.num_bytes, tags, _score(record, reading.score_field) if reading.score_field else 0.0)


def _tag(record: _Record, field: str) -> str:
  """A field as a tag line, as in Gao et al. 2025, arXiv:2501.01956 (`URL: …`); '' if the record lacks the field."""
  value = record.value.get(field)
  if value is None:
    return ''
  if not isinstance(value, str | int | float):
    raise DataError(f'{record.where}: field {field!r} is not text ({type_name(value)}); leave it out of --tag_fields.')
  check_text(f'{record.where}: field {field!r}', str(value))
  return f'{field}: {value}\n'


def _score(record: _Record, field: str) -> float:
  value = record.value.get(field)
  if type(value) not in (int, float) or not abs(value) <= LARGEST_SCORE:
    raise DataError(
      f'{record.where}: field {field!r} is {value!r:.40}, not a float32 number; name another field with --score_field=.'
    )
  return float(value)


def _pair(record: _Record, reading: Reading) -> Iterator[Segment]:
  inputs_field, targets_field = reading.pair
  inputs = _text(record, inputs_field, '--inputs_field')
  targets = _text(record, targets_field, '--targets_field')
  where = f'{record.where}: field {targets_field!r}'
  if is_blank(targets):
    raise empty_error(where)
  yield Segment(inputs, True, record.num_bytes)
  yield Segment(targets, True, 0, required=where)


def _conversation(record: _Record, reading: Reading) -> Iterator[Segment]:
  turns = turns_of(record.where, record.value, reading.messages)
  for i, (role, text) in enumerate(turns):
    size = 0 if i else record.num_bytes
    required = f'{record.where}: {reading.messages}[{i}]' if role == 'assistant' else ''
    left = len(turns) - 1 - i
    yield Segment(text, True, size, marker(role), role=ROLES.index(role), turns_left=left, required=required)


def _not_empty(path: pathlib.Path, segments: Iterable[Segment], is_empty: Callable[[str], bool]) -> Iterator[Segment]:
  empty = True
  for segment in segments:
    empty = empty and is_empty(segment.text)
    yield segment
  if empty:
    raise DataError(f'{path} is empty; remove it from the inputs.')


class _Piece(NamedTuple):
  """A line, or a part of a long line, of `num_bytes`; `ends` is True if the line ends here."""

  text: str
  num_bytes: int
  ends: bool


def _pieces(path: pathlib.Path, longest: int, meter: Meter) -> Iterator[_Piece]:
  """The lines of a file, in pieces of at most `longest` bytes. Raises DataError at the first byte that is not UTF-8."""
  offset, rest = 0, b''
  try:
    with open_bytes(path, meter) as file:
      while block := rest + file.readline(longest - len(rest)):
        if not offset and block.startswith(codecs.BOM_UTF8):  # some editors write it; it is not part of the text
          offset, block = len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8) :]
        ends = len(block) < longest or block.endswith(b'\n')
        cut = len(block) if ends else _place_to_cut(block)
        yield _Piece(decode(str(path), block[:cut], offset), cut, ends)
        offset, rest = offset + cut, block[cut:]
  except OSError as error:
    raise DataError(f'{path} cannot be read ({error.strerror}); check the path.') from error


def _place_to_cut(block: bytes) -> int:
  """The position after the last white space; without any, before the last character, which may be incomplete."""
  if (space := max(block.rfind(white) for white in b' \t\r')) >= 0:
    return space + 1
  for place in range(len(block) - 1, max(len(block) - 5, 0), -1):
    if block[place] & 0xC0 != 0x80:  # not a continuation byte: a character begins here
      return place
  return len(block)


def _lines(path: pathlib.Path, meter: Meter) -> Iterator[_Record]:
  """The JSON value of each line that is not blank."""
  for number, (line, size, _) in enumerate(_pieces(path, sys.maxsize, meter), 1):
    if line.strip():
      yield _Record(f'{path}:{number}', parse_json(f'{path}:{number}', line), size)


def _text(record: _Record, field: str, flag: str) -> str:
  """The text of a field. Raises DataError if there is none or if `check_text` refuses it."""
  where, value = record.where, record.value
  text = value.get(field) if isinstance(value, dict) else None
  if not isinstance(text, str):
    keys = ', '.join(value) if isinstance(value, dict) else type(value).__name__
    kind = f', which is {type_name(text)}' if isinstance(value, dict) and field in value else ''
    raise DataError(f'{where}: no text in field {field!r}{kind} (found: {keys}); name it with {flag}=.')
  check_text(f'{where}: field {field!r}', text)
  return text


def _whole_file(path: pathlib.Path, meter: Meter) -> Iterator[Segment]:
  held, size = [], 0
  for text, count, _ in _pieces(path, SEGMENT_BYTES, meter):
    if size >= SEGMENT_BYTES:
      yield Segment(''.join(held), False, size)
      held, size = [], 0
    held.append(text)
    size += count
  yield Segment(''.join(held), True, size)


def _parts(path: pathlib.Path, reading: Reading, meter: Meter) -> Iterator[Segment]:
  held, size, blank = [], 0, True  # blank: this line has only white space so far
  for text, count, ends in _pieces(path, SEGMENT_BYTES, meter):
    blank = blank and not text.strip()
    if held and not blank and size >= SEGMENT_BYTES:
      yield Segment(''.join(held), False, size)
      held, size = [], 0
    size += count
    if not blank:
      held.append(text)
    if held and ends and (reading.documents == 'line' or blank):
      yield Segment(''.join(held), True, size)
      held, size = [], 0
    blank = blank or ends
  if held:
    yield Segment(''.join(held), True, size)


def sample(texts: Iterable[tuple[str, float]], budget: int) -> Iterator[str]:
  """Yields an even sample of the texts, about `budget` characters; each input is (text, fraction of all text read)."""
  taken = 0
  for text, fraction in texts:
    if taken + len(text) / 2 <= budget * fraction:
      taken += len(text)
      yield text
