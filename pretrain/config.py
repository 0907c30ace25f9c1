"""Gin's notation -> frozen dataclasses. Configs hold values, code holds code. The only gin and ml_collections import."""

import dataclasses
import difflib
import io
import math
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from gin import config_parser
from ml_collections import ConfigDict

from pretrain.errors import ConfigError

T = TypeVar('T')


class _Macro(typing.NamedTuple):
  name: str


class _Delegate(config_parser.ParserDelegate):
  def configurable_reference(self, scoped_configurable_name, evaluate):
    raise _Refused(
      f"@{scoped_configurable_name} is a reference; configs hold values. Name the choice, e.g. optimizer.name = 'adamw'"
    )

  def macro(self, macro_name):
    return _Macro(macro_name)


class _Refused(Exception):
  pass


def load(schema: type[T], files: Sequence[str], overrides: Sequence[str] = ()) -> T:
  """An instance of `schema` from gin files, then `key=value` overrides; the last binding of a key wins.

  Raises ConfigError, naming file and line, for syntax, unknown, missing or mistyped keys, and what is no value.
  """
  bindings: dict[str, tuple[Any, str]] = {}
  macros: dict[str, Any] = {}
  for file in files:
    for key, value, place in _read(pathlib.Path(file), ()):
      _bind(bindings, macros, key, value, place)
  for override in overrides:
    key = override.split('=', 1)[0].strip()
    for _, value, place in _parse(override + '\n', f'--gin.{key}', None, ()):
      _bind(bindings, macros, key, value, f'--gin.{key}')
  values = {key: (_resolve(value, macros, place), place) for key, (value, place) in bindings.items()}
  tree, places = _nest(values)
  return _Builder(places, files[-1] if files else 'the config').build(schema, tree, '')


def flatten(cfg: Any, prefix: str = '') -> dict[str, Any]:
  """Every value of a config dataclass by its dotted key; tuples of dataclasses become lists of dicts."""
  flat: dict[str, Any] = {}
  for field in dataclasses.fields(cfg):
    value, key = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      flat |= flatten(value, key + '.')
    else:
      flat[key] = _plain(value)
  return flat


def render(cfg: Any) -> str:
  """The resolved config as gin text, which `load` reads back to an equal config."""
  lines, section = [], ''
  for key, value in flatten(cfg).items():
    if key.split('.')[0] != section and lines and '.' in key:
      lines.append('')
    section = key.split('.')[0]
    lines.append(f'{key} = {value!r}')
  return '\n'.join(lines) + '\n'


def _plain(value: Any) -> Any:
  if isinstance(value, tuple):
    return [_plain(v) for v in value] if value and dataclasses.is_dataclass(value[0]) else value
  return (
    {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if dataclasses.is_dataclass(value)
    else value
  )


# --- reading -------------------------------------------------------------------------------------


def _read(path: pathlib.Path, including: tuple[pathlib.Path, ...]) -> Iterator[tuple[str, Any, str]]:
  if path.resolve() in including:
    raise ConfigError(f'{including[-1]}: include {str(path)!r} includes itself; remove one of the two includes.')
  try:
    text = path.read_text(encoding='utf-8')
  except OSError as error:
    where = f'{including[-1]}: include ' if including else '--gin_file='
    raise ConfigError(f'{where}{path} cannot be read ({error.strerror}); check the path.') from error
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path} is not UTF-8 text (byte {error.start}); is it a gin file?') from error
  yield from _parse(text, str(path), path, (*including, path.resolve()))


def _parse(text: str, name: str, path: pathlib.Path | None, including: tuple) -> Iterator[tuple[str, Any, str]]:
  try:
    statements = list(config_parser.ConfigParser(io.StringIO(text), _Delegate()))
  except _Refused as error:
    raise ConfigError(f'{name}: {str(error).splitlines()[0]}.') from error
  except (SyntaxError, ValueError) as error:
    line = getattr(error, 'lineno', None)
    where = f'{name}:{line}' if path and line else name
    raise ConfigError(f'{where}: {getattr(error, "msg", error)}; write key = value, one to a line.') from error
  for statement in statements:
    place = f'{name}:{statement.location.line_num}' if path else name
    if isinstance(statement, config_parser.IncludeStatement):
      yield from _read((path or pathlib.Path()).parent / statement.filename, including)
    elif isinstance(statement, config_parser.ImportStatement):
      raise ConfigError(
        f'{place}: import {statement.module} is refused; configs hold values, code holds code. Remove the line.'
      )
    elif isinstance(statement, config_parser.BindingStatement):
      if statement.scope:
        raise ConfigError(
          f'{place}: {statement.scope}/ is a scope; write the full key, e.g. {statement.selector}.{statement.arg_name}.'
        )
      yield '.'.join(part for part in (statement.selector, statement.arg_name) if part), statement.value, place


def _bind(bindings, macros, key: str, value: Any, place: str) -> None:
  """A name without a dot is a macro where it is written in capitals, otherwise a top-level key."""
  if '.' not in key and key.isupper():
    macros[key] = _resolve(value, macros, place)
  else:
    bindings[key] = (value, place)


def _resolve(value: Any, macros: Mapping[str, Any], place: str) -> Any:
  """`value` with each %NAME replaced."""
  if isinstance(value, _Macro):
    if value.name not in macros:
      raise ConfigError(
        f'{place}: %{value.name} is not defined; add {value.name} = … above it (macros are in capitals).'
      )
    return macros[value.name]
  if isinstance(value, list | tuple):
    return type(value)(_resolve(v, macros, place) for v in value)
  return {k: _resolve(v, macros, place) for k, v in value.items()} if isinstance(value, dict) else value


def _nest(values: Mapping[str, tuple[Any, str]]) -> tuple[ConfigDict, dict[str, str]]:
  """Dotted keys -> a nested ConfigDict, and where each key was written."""
  tree, places = ConfigDict(type_safe=False), {}
  for key, (value, place) in values.items():
    *parents, leaf = key.split('.')
    node = tree
    for name in parents:
      if not isinstance(node.get(name, ConfigDict()), ConfigDict):
        raise ConfigError(f'{place}: {key}: {name} already has a value; it cannot have keys as well.')
      if name not in node:
        node[name] = ConfigDict(type_safe=False)
      node = node[name]
    # ConfigDict would turn a dict into one of itself; only dotted keys nest here.
    node[leaf] = _Leaf(value)
    places[key] = place
  return tree, places


class _Leaf(typing.NamedTuple):
  value: Any


# --- building ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Builder:
  """Builds dataclasses from a nested tree; knows where each key was written."""

  places: Mapping[str, str]
  file: str

  def where(self, key: str) -> str:
    """`file:line: ` of a key (or of the nearest list that holds it)."""
    parent = key.split('[')[0]
    found = next((p for k, p in self.places.items() if k == parent or k.startswith(parent + '.')), None)
    return f'{found}: ' if found else ''

  def build(self, schema: Any, tree: Any, key: str) -> Any:
    """`schema` is a dataclass or a union of dataclasses; `tree` maps its field names to values."""
    schema = self.pick(schema, tree, key)
    hints, prefix = typing.get_type_hints(schema), key + '.' if key else ''
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name in tree:
      if name not in fields:
        raise ConfigError(self.unknown(prefix + name, name, fields, schema, tree))
    kwargs = {}
    for name, field in fields.items():
      if name in tree:
        kwargs[name] = self.value(hints[name], tree[name], prefix + name)
      elif _has_default(field):
        continue
      elif _is_section(hints[name]):
        kwargs[name] = self.build(hints[name], {}, prefix + name)
      else:
        raise ConfigError(f'{prefix}{name} is required and not set; add {prefix}{name} = … to {self.file}.')
    return schema(**kwargs)

  def pick(self, schema: Any, tree: Any, key: str) -> Any:
    """The member of a union of dataclasses that `tree.name` says."""
    members = [m for m in typing.get_args(schema) if dataclasses.is_dataclass(m)] or [schema]
    if len(members) == 1:
      return members[0]
    names = {_name_of(m): m for m in members}
    if 'name' not in tree:
      raise ConfigError(f'{self.where(key)}{key}.name is required and not set; choose one of {_choices(names)}.')
    name = _leaf(tree['name'])
    if name not in names:
      hint = _nearest(str(name), names)
      raise ConfigError(f'{self.where(key + ".name")}{key}.name={name!r} is not one of {_choices(names)}{hint}.')
    return names[name]

  def unknown(self, key: str, name: str, fields, schema, tree) -> str:
    picked = f" with name='{_name_of(schema)}'" if 'name' in fields and 'name' in tree else ''
    hint = _nearest(name, fields, key[: len(key) - len(name)])
    return f'{self.where(key)}unknown key {key}{hint or f"; the keys{picked} are " + ", ".join(fields) + "."}'

  def value(self, hint: Any, given: Any, key: str) -> Any:
    """`given` as type `hint`; int -> float is the only coercion."""
    given = _leaf(given)
    if _is_section(hint):
      if not isinstance(given, Mapping | ConfigDict):
        raise ConfigError(f'{self.where(key)}{key}={given!r}, expected its own keys, e.g. {key}.name = ….')
      return self.build(hint, given, key)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
      if given is None and type(None) in args:
        return None
      return self.value(next(a for a in args if a is not type(None)), given, key)
    if origin is tuple and isinstance(given, list | tuple):
      return self.sequence(args, given, key)
    if origin is Literal:
      if given not in args:
        raise ConfigError(
          f'{self.where(key)}{key}={given!r} is not one of {_choices(args)}{_nearest(str(given), args)}.'
        )
      return given
    return self.scalar(hint, given, key)

  def scalar(self, hint: Any, given: Any, key: str) -> Any:
    if hint is float and type(given) is int:
      return float(given)
    if type(given) is not hint:
      expected = getattr(hint, '__name__', str(hint))
      raise ConfigError(f'{self.where(key)}{key}={given!r} is {type(given).__name__}, expected {expected}.')
    if hint is float and math.isnan(given):
      raise ConfigError(f'{self.where(key)}{key} is nan; give a number.')
    return given

  def sequence(self, args: tuple, given: Sequence, key: str) -> tuple:
    if args[-1:] == (...,):
      args = (args[0],) * len(given)
    if len(args) != len(given):
      raise ConfigError(f'{self.where(key)}{key} has {len(given)} values, expected {len(args)}.')
    return tuple(self.value(a, v, f'{key}[{i}]') for i, (a, v) in enumerate(zip(args, given, strict=True)))


def _leaf(given: Any) -> Any:
  return given.value if isinstance(given, _Leaf) else given


def _has_default(field: dataclasses.Field) -> bool:
  return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _is_section(hint: Any) -> bool:
  """True for a dataclass and for a union of dataclasses (without None)."""
  args = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
  return all(dataclasses.is_dataclass(a) for a in args)


def _name_of(schema: Any) -> str:
  return typing.get_args(typing.get_type_hints(schema)['name'])[0]


def _choices(names) -> str:
  return ', '.join(repr(n) for n in names)


def _nearest(name: str, names, prefix: str = '') -> str:
  close = difflib.get_close_matches(name, [str(n) for n in names], 1)
  return f'; did you mean {prefix}{close[0]}?' if close else ''
