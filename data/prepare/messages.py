"""Conversations in records: a list of messages, each with the role of the speaker and the text.

[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], or ShareGPT's keys "from" and "value" with
the roles human and gpt.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from data.errors import DataError
from data.prepare.inputs import check_text
from data.prepare.parquet import type_name

Role = Literal['system', 'user', 'assistant', 'tool']
ROLES: tuple[Role, ...] = get_args(Role)  # stores contain indices into it: add new roles only at the end
SHAREGPT = {'human': 'user', 'gpt': 'assistant'}


class Turn(NamedTuple):
  role: Role
  text: str


def empty_error(where: str) -> DataError:
  """The error for a text, at `where`, that the model should learn to write but that has no tokens."""
  return DataError(f'{where} is empty; write the text to be learnt, or leave out the record.')


def marker(role: Role) -> str:
  """The text in front of a turn that names its role. It is plain text, so the vocabulary needs no extra tokens.

  The same characters inside a text cannot be mistaken for a new turn: a turn begins only at the beginning of a
  conversation or after an EOS, and text never contains an EOS.
  """
  return f'{role}:'


def turns_of(where: str, record: Any, field: str) -> list[Turn]:
  """The turns in `field` of a record. Raises DataError, naming the message, if they are not a valid conversation."""
  messages = record.get(field) if isinstance(record, Mapping) else None
  if not isinstance(messages, list):
    found = ', '.join(record) if isinstance(record, Mapping) else type(record).__name__
    raise DataError(
      f'{where}: no list of messages in field {field!r} (found: {found}); name it with --messages_field=.'
    )
  turns = [_turn(f'{where}: {field}[{i}]', message) for i, message in enumerate(messages)]
  if not any(turn.role == 'assistant' for turn in turns):
    what = 'has no turn of the assistant' if turns else 'is empty'
    raise DataError(f'{where}: field {field!r} {what}, so nothing would be learnt from it; leave out the record.')
  return turns


def _turn(where: str, message: Any) -> Turn:
  if not isinstance(message, Mapping) or not message.keys() & {'role', 'from'}:
    found = ', '.join(message) if isinstance(message, Mapping) else type(message).__name__
    raise DataError(f"{where} has no 'role' and 'content', nor ShareGPT's 'from' and 'value' (found: {found}).")
  names = ('role', 'content') if 'role' in message else ('from', 'value')
  given, text = (message.get(name) for name in names)
  role = SHAREGPT.get(given, given) if isinstance(given, str) else None
  if role not in ROLES:
    raise DataError(f'{where}.{names[0]} is {given!r}; rename it: roles are {", ".join(ROLES)} (or human, gpt).')
  if not isinstance(text, str):
    raise DataError(f'{where}.{names[1]} is not text ({type_name(text)}); make it a string, or leave out the record.')
  if role == 'assistant' and not text.strip():
    raise empty_error(f'{where}.{names[1]}')
  check_text(f'{where}.{names[1]}', text)
  return Turn(role, text)
