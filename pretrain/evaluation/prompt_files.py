"""Prompts from a file: JSONL with a field, or plain lines; gzip and zstd are unpacked."""

import pathlib
from collections.abc import Iterator
from typing import Any

from data.errors import DataError
from data.prepare.inputs import Meter, check_text, decode, open_bytes, parse_json
from data.prepare.kinds import kind_of


def read_prompts(path: pathlib.Path, field: str = 'text') -> list[tuple[str, str]]:
  """(place, prompt) of each line that is not blank. Raises DataError, with the line, for what is not a prompt."""
  if kind_of(path).holds == 'json':
    found = [(place, text_field(place, record, field)) for place, record in read_records(path)]
  else:
    found = [(place, line) for place, line in _lines(path) if line.strip()]
  if not found:
    raise DataError(f'{path} has no prompts; write one a line, or JSONL with a field "{field}".')
  return found


def read_records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """(place, object) of each line of a JSONL file. Raises DataError for a line that is no JSON object."""
  for place, line in _lines(path):
    if line.strip():
      record = parse_json(place, line)
      if not isinstance(record, dict):
        raise DataError(f'{place}: not a JSON object; each line must be one.')
      yield place, record


def text_field(place: str, record: dict[str, Any], field: str) -> str:
  """A field that is text. Raises DataError where it is missing or not text."""
  value = record.get(field)
  if not isinstance(value, str):
    kind = 'is missing' if value is None else f'is not text ({value!r:.40})'
    raise DataError(f'{place}: field {field!r} {kind}; the fields are {", ".join(record) or "none"}.')
  check_text(f'{place}: field {field!r}', value)
  return value


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  with open_bytes(path, Meter(0)) as file:
    for number, raw in enumerate(file, 1):
      yield f'{path}:{number}', decode(f'{path}:{number}', raw, 0).rstrip('\r\n')
