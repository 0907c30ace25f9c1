"""Gin text -> bindings with the line of each. gin's own parser reads the text; this is the only import of gin.

The text holds `key = value` bindings, `include`, macros (`WIDTH = 8`, then `%WIDTH`) and comments. References (`@f`),
scopes (`a/b.c`), `import`, and literals that are no values of a config are refused.
"""

import io
import pathlib
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gin import config_parser

from data.arguments import expand_user
from data.stores.paths import looked_in
from pretrain.errors import ConfigError
from pretrain.workdirs.folder import Folder

SURROGATES = re.compile('[\ud800-\udfff]')
DIGITS = 30  # of a whole number; keys have closer limits
# The longer mark of UTF-32 begins with that of UTF-16.
MARKS = {
  b'\xff\xfe\0\0': 'UTF-32', b'\0\0\xfe\xff': 'UTF-32', b'\xff\xfe': 'UTF-16', b'\xfe\xff': 'UTF-16',
}  # fmt: skip


class Macro(NamedTuple):
  name: str


class Reference(NamedTuple):
  name: str


class Binding(NamedTuple):
  """`key = value`, and where it was written: 'file:line' or '--gin.key'."""

  key: str
  value: Any
  place: str


class LiteralError(Exception):
  """A literal that gin's parser accepts and a config does not: (what, line)."""


class Delegate(config_parser.ParserDelegate):
  """Keeps macros and references as they are written; both are dealt with where the line is known."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return Reference(scoped_configurable_name)

  def macro(self, macro_name):
    return Macro(macro_name)


class Parser(config_parser.ConfigParser):
  """gin's parser, which builds a dict from its items and so cannot see that a key is repeated; and stricter."""

  def __init__(self, text: str):
    self._open_dicts: list[set[str]] = []  # the keys read so far, innermost dict last
    super().__init__(io.StringIO(text), Delegate())

  def parse_value(self) -> Any:
    line = self._current_token.start[0]
    value = super().parse_value()
    if problem := problem_of(value):
      raise LiteralError(problem, line)
    return value

  def _maybe_parse_container(self):
    is_dict = self._current_token.string == '{'
    if not is_dict:
      return super()._maybe_parse_container()
    self._open_dicts.append(set())
    found = super()._maybe_parse_container()
    self._open_dicts.pop()
    return found

  def _parse_dict_item(self):
    line = self._current_token.start[0]
    key, value = super()._parse_dict_item()
    if isinstance(key, Macro | Reference | list | dict | tuple):
      raise LiteralError(f"{written(key)} is the key of a dict; write a string, e.g. {{'path': …}}", line)
    if key in self._open_dicts[-1]:
      raise LiteralError(f'the key {key!r} is in one dict twice; remove one of them', line)
    self._open_dicts[-1].add(key)
    return key, value


def written(value: Any) -> str:
  """A value as its file has it."""
  sign = {Macro: '%', Reference: '@'}.get(type(value))
  return f'{sign}{value.name}' if sign else repr(value)


def problem_of(value: Any) -> str | None:
  """Why a literal is no value of a config; None for one that is."""
  if isinstance(value, bytes | complex):
    return f'{value!r} is {type(value).__name__}; values are numbers, strings, True, False, None, lists and dicts'
  if type(value) is int and abs(value) >= 10**DIGITS:
    return f'a whole number of {len(str(abs(value)))} digits; write one of at most {DIGITS}'
  if isinstance(value, str) and '\0' in value:
    return f'{value!r} has a NUL character (\\0); remove it'
  return None


def read_file(path: Folder, blame: str, including: tuple[Folder, ...]) -> Iterator[Binding]:
  """The bindings of a file and of what it includes. `blame` begins the sentence when it cannot be read."""
  try:
    resolved = path.resolve()
    if resolved in including:
      raise ConfigError(f'{blame}{path} includes itself; remove one of the includes.')
    raw = path.read_bytes()
  except OSError as error:
    raise ConfigError(
      f'{blame}{path}{looked_in(str(path))} cannot be read ({error.strerror}); check the path.'
    ) from error
  except (RuntimeError, ValueError) as error:  # before Python 3.13 a circle of links; a NUL in a path
    raise ConfigError(f'{blame}{path} cannot be read ({error}); check the path.') from error
  yield from read_text(decode(raw, f'{blame}{path}'), path, None, (*including, resolved))


def decode(raw: bytes, blame: str) -> str:
  """The text of a file in UTF-8, with or without a byte order mark; lines end with a line feed, as in text files."""
  encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), None)
  if encoding is None and b'\0' in raw[:2]:  # ASCII in UTF-16 has a NUL in every other byte
    encoding = 'UTF-16BE' if raw[:1] == b'\0' else 'UTF-16LE'
  if encoding:
    raise ConfigError(f'{blame} is {encoding} text; save it as UTF-8, e.g. iconv -f {encoding} -t UTF-8 FILE.')
  if b'\0' in raw:
    line = raw.count(b'\n', 0, raw.index(b'\0')) + 1
    raise ConfigError(f'{blame} has a NUL byte in line {line} (byte {raw.index(0)}); is it a gin file, and undamaged?')
  try:
    text = raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(f'{blame} is not UTF-8 text (byte {error.start}); is it a gin file?') from error
  return text.removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')


def read_text(text: str, path: pathlib.Path, name: str | None, including: tuple) -> Iterator[Binding]:
  """The bindings of `text`, which stands in `path`, or is the flag `name`."""
  for statement in parse(text, path, name):
    place = name or f'{path}:{statement.location.line_num}'
    match statement:
      case config_parser.IncludeStatement():
        yield from read_file(path.parent / expand_user(statement.filename), f'{place}: ', including)
      case config_parser.ImportStatement():
        raise ConfigError(f'{place}: import {statement.module}: configs hold values, code holds code. Remove the line.')
      case config_parser.BindingStatement():
        key = '.'.join(part for part in (statement.selector, statement.arg_name) if part)
        if statement.scope:
          raise ConfigError(f'{place}: {statement.scope}/ is a scope; give each section its own key, e.g. {key} = …')
        refuse_references(statement.value, place)
        yield Binding(key, statement.value, place)


def parse(text: str, path: pathlib.Path, name: str | None) -> Sequence[Any]:
  """gin's statements; raises ConfigError naming the line where gin's parser gave up."""
  place = lambda line: name or (f'{path}:{line}' if line else str(path))
  # Bytes of a command line that are not UTF-8, as a path may have, are escaped: Python reads no literal with them.
  text = SURROGATES.sub(lambda found: f'\\u{ord(found[0]):x}', text)
  try:
    return list(Parser(text + '\n'))
  except LiteralError as error:
    problem, line = error.args
    raise ConfigError(f'{place(line)}: syntax error: {problem}.') from error
  except RecursionError as error:
    raise ConfigError(f'{name or path}: syntax error: lists or dicts are nested too deep.') from error
  except (SyntaxError, ValueError, tokenize.TokenError) as error:
    line = error.args[1][0] if isinstance(error, tokenize.TokenError) else getattr(error, 'lineno', None)
    # A bracket that is never closed is noticed behind the end.
    where = place(line and min(line, len(text.splitlines())))
    raise ConfigError(f'{where}: syntax error; write one `key = value` to a line, strings in quotes.') from error


def inside(value: Any) -> Iterator[Any]:
  """`value` and everything in it."""
  yield value
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, list | tuple):
    for each in value:
      yield from inside(each)


def refuse_references(value: Any, place: str) -> None:
  for found in inside(value):
    if isinstance(found, Reference):
      raise ConfigError(
        f"{place}: @{found.name} is a reference; configs hold values. Name the choice: optimizer.name = 'adamw'."
      )
