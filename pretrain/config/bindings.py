"""Gin's notation -> frozen dataclasses. Configs hold values, code holds code. The only gin and ml_collections import.

`.gin` files are read by gin-config's own parser: `key = value` bindings, `include`, macros (`WIDTH = 8`, then
`%WIDTH`), comments. References (`@f`), scopes (`a/b.c`) and `import` are refused.
"""

import dataclasses
import io
import pathlib
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from gin import config_parser
from ml_collections import ConfigDict

from pretrain.config.schema import Builder
from pretrain.errors import ConfigError

T = TypeVar('T')


class Macro(NamedTuple):
  name: str


class Reference(NamedTuple):
  name: str


class Binding(NamedTuple):
  """`key = value`, and where it was written: 'file:line' or '--gin.key'."""

  key: str
  value: Any
  place: str


def load(schema: type[T], files: Sequence[str], overrides: Sequence[str] = ()) -> T:
  """An instance of `schema` from gin files, then `key=value` overrides; the last binding of a key wins.

  Raises ConfigError, naming file and line, for syntax, unknown, missing or mistyped keys, and what is no value.
  """
  bindings = [binding for file in files for binding in read_file(pathlib.Path(file), '--gin_file=', ())]
  for override in overrides:
    name = '--gin.' + override.split('=', 1)[0].strip()
    bindings += read_text(override, pathlib.Path(), name, ())
  # A name without a dot in capitals is a macro; anything else is a key. Macros may be overridden, so they come first.
  macros = {b.key: b for b in bindings if is_macro(b.key)}
  keys = {b.key: b._replace(value=expand(b.value, macros, b.place)) for b in bindings if not is_macro(b.key)}
  places = {key: binding.place for key, binding in keys.items()}
  builder = Builder(places, files[-1] if files else 'the config', outdated(bindings))
  return builder.build(schema, nest(keys), '')


def outdated(bindings: Sequence[Binding]) -> frozenset[str]:
  """Keys of a section that were all written before another `name` was chosen for it: they may be of the first choice.

  >>> b = lambda key, value: Binding(key, value, '')
  >>> sorted(outdated([b('a.name', 'x'), b('a.p', 1), b('a.q', 1), b('a.name', 'y'), b('a.q', 2)]))
  ['a.p']
  """
  names, old = {}, set()
  seen: set[str] = set()
  for key, value, _ in bindings:
    if key.endswith('.name') and names.setdefault(key, value) != value:
      section = key.removesuffix('name')
      old |= {other for other in seen if other.startswith(section) and other != key}
      names[key] = value
    seen.add(key)
    old.discard(key)
  return frozenset(old)


def override(cfg: T, values: Mapping[str, Any], place: str) -> T:
  """`cfg` with other values at some dotted keys; a section whose `name` changes starts from its own defaults.

  Raises ConfigError as `load` does; `place` is where the values were written.
  """
  bindings = {key: Binding(key, value, place) for key, value in values.items()}
  builder = Builder(dict.fromkeys(values, place), place)
  return builder.build(type(cfg), nest(bindings), '', default=cfg)


def flatten(cfg: Any, prefix: str = '') -> dict[str, Any]:
  """Every value of a config dataclass by its dotted key; tuples of dataclasses become lists of dicts."""
  flat: dict[str, Any] = {}
  for field in dataclasses.fields(cfg):
    value, key = getattr(cfg, field.name), prefix + field.name
    flat |= flatten(value, key + '.') if dataclasses.is_dataclass(value) else {key: plain(value)}
  return flat


def render(cfg: Any) -> str:
  """The resolved config as gin text, one key a line, which `load` reads back to an equal config."""
  flat, lines = flatten(cfg), []
  for section in dict.fromkeys(key.split('.')[0] for key in flat):
    lines += [f'{key} = {value!r}' for key, value in flat.items() if key.split('.')[0] == section] + ['']
  return '\n'.join(lines[:-1]) + '\n'


def plain(value: Any) -> Any:
  """A value as gin can write it: dataclasses inside of tuples as dicts."""
  if dataclasses.is_dataclass(value):
    return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if _is_rendered(f, value)}
  if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
    return [plain(v) for v in value]
  return value


def _is_rendered(field: dataclasses.Field, value: Any) -> bool:
  return field.metadata.get('rendered') != 'if set' or getattr(value, field.name) != field.default


class Delegate(config_parser.ParserDelegate):
  """Keeps macros and references as they are written; both are dealt with where the line is known."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return Reference(scoped_configurable_name)

  def macro(self, macro_name):
    return Macro(macro_name)


def read_file(path: pathlib.Path, blame: str, including: tuple[pathlib.Path, ...]) -> Iterator[Binding]:
  """The bindings of a file and of what it includes. `blame` begins the sentence when it cannot be read."""
  if path.resolve() in including:
    raise ConfigError(f'{blame}{path} includes itself; remove one of the includes.')
  try:
    text = path.read_text(encoding='utf-8')
  except OSError as error:
    raise ConfigError(f'{blame}{path} cannot be read ({error.strerror}); check the path.') from error
  except UnicodeDecodeError as error:
    raise ConfigError(f'{blame}{path} is not UTF-8 text (byte {error.start}); is it a gin file?') from error
  yield from read_text(text, path, None, (*including, path.resolve()))


def read_text(text: str, path: pathlib.Path, name: str | None, including: tuple) -> Iterator[Binding]:
  """The bindings of `text`, which stands in `path`, or is the flag `name`."""
  for statement in parse(text, path, name):
    place = name or f'{path}:{statement.location.line_num}'
    match statement:
      case config_parser.IncludeStatement():
        yield from read_file(path.parent / statement.filename, f'{place}: ', including)
      case config_parser.ImportStatement():
        raise ConfigError(f'{place}: import {statement.module}: configs hold values, code holds code. Remove the line.')
      case config_parser.BindingStatement():
        key = '.'.join(part for part in (statement.selector, statement.arg_name) if part)
        if statement.scope:
          raise ConfigError(f'{place}: {statement.scope}/ is a scope; give each section its own key, e.g. {key} = …')
        refuse_references(statement.value, place)
        yield Binding(key, statement.value, place)


def parse(text: str, path: pathlib.Path, name: str | None) -> list[Any]:
  """gin's statements; raises ConfigError naming the line where gin's parser gave up."""
  try:
    return list(config_parser.ConfigParser(io.StringIO(text + '\n'), Delegate()))
  except (SyntaxError, ValueError, tokenize.TokenError) as error:
    line = error.args[1][0] if isinstance(error, tokenize.TokenError) else getattr(error, 'lineno', None)
    # A bracket that is never closed is noticed behind the end.
    place = name or (f'{path}:{min(line, len(text.splitlines()))}' if line else str(path))
    raise ConfigError(f'{place}: syntax error; write one `key = value` to a line, strings in quotes.') from error


def is_macro(key: str) -> bool:
  return '.' not in key and key.isupper()


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


def expand(value: Any, macros: Mapping[str, Binding], place: str, open_macros: tuple[str, ...] = ()) -> Any:
  """`value` with each %NAME replaced."""
  if isinstance(value, Macro):
    if value.name not in macros or value.name in open_macros:
      what = 'is defined by itself; give' if value.name in macros else 'is not defined; add'
      raise ConfigError(f'{place}: %{value.name} {what} {value.name} = … (macros are written in capitals).')
    found = macros[value.name]
    return expand(found.value, macros, found.place, (*open_macros, value.name))
  if isinstance(value, Mapping):
    return {k: expand(v, macros, place, open_macros) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(expand(v, macros, place, open_macros) for v in value)
  return value


def nest(keys: Mapping[str, Binding]) -> dict[str, Any]:
  """Dotted keys -> nested dicts."""
  tree = ConfigDict(type_safe=False, convert_dict=False)
  for key, binding in keys.items():
    *parents, leaf = key.split('.')
    node = tree
    for depth, name in enumerate(parents, 1):
      owner = '.'.join(parents[:depth])
      if owner in keys:
        raise ConfigError(f'{binding.place}: {key}: {owner} already has a value ({keys[owner].place}).')
      if name not in node:
        node[name] = ConfigDict(type_safe=False, convert_dict=False)
      node = node[name]
    node[leaf] = binding.value
  return tree.to_dict()
