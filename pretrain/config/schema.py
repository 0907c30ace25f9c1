"""Nested values -> frozen dataclasses, checked against their annotations. Of files it uses only the places of keys.

Annotations may be int, float, str, bool, Literal, X | None, tuple[X, ...], tuple[X, Y], Mapping (names to any values),
a dataclass, or a union of dataclasses, each with a field `name: Literal['…']` that picks it. int -> float is the only
coercion. A range stands next to its field, in words that need no import: `Annotated[int, '>= 1']`,
`Annotated[float, '[0, 1)']`; so does `Annotated[str, 'path']`, which expands `~` and may have bytes that are not UTF-8.
Words that took the place of a bool stand there too: `Annotated[Literal['none', 'all'], {False: 'none', True: 'all'}]`.
"""

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from data.arguments import expand_user, is_text
from pretrain.config.other_stacks import instead_of
from pretrain.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Builder:
  """Builds dataclasses from nested dicts. `places` has the file and line of each dotted key; a new key goes in `file`.

  Keys in `outdated` were written before another choice was made for their section; those that it lacks are dropped.
  """

  places: Mapping[str, str]
  file: str
  outdated: frozenset[str] = frozenset()

  def build(self, hint: Any, tree: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A dataclass from its keys in `tree`; missing keys get their values from `default`, then from the class."""
    schema = self.pick(hint, tree, key, default)
    hints = typing.get_type_hints(schema, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name in tree:
      if name not in fields and not self.is_outdated(join(key, name)):
        raise ConfigError(self.unknown(join(key, name), name, schema, hint))
    base = default if type(default) is schema else None
    values = {}
    for name, field in fields.items():
      if name in tree:
        values[name] = self.value(hints[name], tree[name], join(key, name), default_of(field, base))
      elif base is not None:
        values[name] = getattr(base, name)
      elif default_of(field, None) is dataclasses.MISSING:
        values[name] = self.missing(hints[name], join(key, name))
    return schema(**values)

  def is_outdated(self, key: str) -> bool:
    """Whether every binding at `key` or under it was written for another choice."""
    written = {known for known in self.places if known == key or known.startswith(key + '.')}
    return bool(written) and written <= self.outdated

  def pick(self, hint: Any, tree: Mapping[str, Any], key: str, default: Any) -> Any:
    """The member of a union of dataclasses that `name` in `tree` picks; a lone dataclass is returned."""
    members = sections(hint)
    if len(members) == 1:
      return members[0]
    names = {name_of(member): member for member in members}
    if 'name' not in tree:
      if type(default) in members:
        return type(default)
      raise ConfigError(f'{self.unset(key + ".name")}, one of {choices(names)}.')
    return names[self.literal(tuple(names), tree['name'], f'{key}.name')]

  def missing(self, hint: Any, key: str) -> Any:
    """A section may be built from defaults alone; any other missing key is an error."""
    if is_section(hint):
      return self.build(hint, {}, key)
    raise ConfigError(self.unset(key) + '.')

  def unset(self, key: str) -> str:
    if '[' in key:
      owner = key.split('[')[0]
      return f'{key} is required and not set; add it to {owner} at {self.places[owner]}'
    return f'{key} is required and not set; add {key} = … to {self.file}'

  def unknown(self, key: str, given: Any, schema: Any, hint: Any) -> str:
    name = str(given)
    fields = [f.name for f in dataclasses.fields(schema)]
    text = f'{self.where(key)}unknown key {key}; '
    if known := instead_of(key):
      return f'{text}{known}.'
    if close := difflib.get_close_matches(name, fields, 1):
      return text + f'did you mean {key.removesuffix(name)}{close[0]}?'
    if len(sections(hint)) == 1:
      return text + f'the keys are {", ".join(fields)}.'
    others = [name_of(m) for m in sections(hint) if name in {f.name for f in dataclasses.fields(m)}]
    elsewhere = f' (it is a key of {choices(others)})' if others else ''
    picked = f'{key.removesuffix(name)}name={name_of(schema)!r}'
    return text + f'with {picked} the keys are {", ".join(fields)}{elsewhere}.'

  def value(self, hint: Any, given: Any, key: str, default: Any = None) -> Any:
    """`given` as `hint`; raises ConfigError with the value and what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS and type(None) in args:
      return None if given is None else self.value(without_none(args), given, key)
    if is_section(hint):
      return self.section(hint, given, key, default)
    if origin is Annotated:
      return self.annotated(args[0], args[1], given, key)
    if origin is tuple:
      return self.sequence(args, given, key)
    if origin is Literal:
      return self.literal(args, given, key)
    if origin is Mapping:
      return self.mapping(given, key)
    return self.scalar(hint, given, key)

  def annotated(self, hint: Any, note: Any, given: Any, key: str) -> Any:
    if note == 'path':
      return self.path(given, key)
    if isinstance(note, Mapping):
      return self.value(hint, note[given] if type(given) is bool else given, key)
    return self.bounded(hint, note, given, key)

  def section(self, hint: Any, given: Any, key: str, default: Any) -> Any:
    if isinstance(given, Mapping):
      return self.build(hint, given, key, default)
    fields = [f.name for f in dataclasses.fields(sections(hint)[0])] if len(sections(hint)) == 1 else ['name', '…']
    wanted = f'a dict with the keys {", ".join(fields)}.' if '[' in key else f'keys of its own: {key}.{fields[0]} = …'
    raise ConfigError(f'{self.mistyped(given, key)} {wanted}')

  def sequence(self, args: tuple, given: Any, key: str) -> tuple:
    if not isinstance(given, list | tuple):
      raise ConfigError(f'{self.mistyped(given, key)} a list.')
    if args[-1] is ...:
      args = (args[0],) * len(given)
    if len(args) != len(given):
      raise ConfigError(f'{self.where(key)}{key} has {len(given)} values, expected {len(args)}.')
    return tuple(self.value(a, v, f'{key}[{i}]') for i, (a, v) in enumerate(zip(args, given, strict=True)))

  def mapping(self, given: Any, key: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
      raise ConfigError(f"{self.mistyped(given, key)} a dict of keys and values: {{'schedule.peak': 1e-3}}.")
    return dict(given)

  def bounded(self, hint: Any, allowed: str, given: Any, key: str) -> Any:
    # A closed range is the only limit of its key; seeds have 32 bits without a sign.
    closed = hint is int and type(given) is int and allowed[0] in '[('
    value = given if closed else self.value(hint, given, key)
    if not within(value, allowed):
      raise ConfigError(f'{self.where(key)}{key}={given!r}; it must be {"in " * (allowed[0] in "[(")}{allowed}.')
    return value

  def path(self, given: Any, key: str) -> str:
    if type(given) is not str:
      raise ConfigError(f'{self.mistyped(given, key)} str.')
    return expand_user(given)

  def literal(self, allowed: Sequence[Any], given: Any, key: str) -> Any:
    if given in allowed:
      return given
    words = [str(a) for a in allowed]
    # Names that start with the given word are suggested before similar ones: for 'gelu' 'gelu_tanh', not 'relu'.
    close = [w for w in words if given and w.startswith(str(given))] or difflib.get_close_matches(str(given), words, 1)
    hint = f'; did you mean {" or ".join(map(repr, close))}?' if close else '.'
    raise ConfigError(f'{self.where(key)}{key}={given!r} is not one of {choices(allowed)}{hint}')

  def scalar(self, hint: type, given: Any, key: str) -> Any:
    if hint is float and type(given) is int:
      return float(given)
    if type(given) is not hint:
      raise ConfigError(f'{self.mistyped(given, key)} {hint.__name__}.')
    if hint is int and given not in INTEGERS:
      raise ConfigError(f'{self.where(key)}{key}={given} does not fit in 32 bits; the largest is {INTEGERS[-1]}.')
    if hint is str and not is_text(given):
      raise ConfigError(f'{self.where(key)}{key}={given!r} has bytes that are not UTF-8; write the text in UTF-8.')
    if hint is float and not math.isfinite(given):
      raise ConfigError(f'{self.where(key)}{key} is {given}, expected a finite number.')
    return given

  def mistyped(self, given: Any, key: str) -> str:
    return f'{self.where(key)}{key}={given!r} is {type(given).__name__}, expected'

  def where(self, key: str) -> str:
    """`file:line: ` of a key, of the list or dict that holds it, or of the first key inside it."""
    owner = key.split('[')[0]
    while owner:
      for known, place in self.places.items():
        if known == owner or known.startswith(owner + '.'):
          return f'{place}: '
      owner = owner.rpartition('.')[0]
    return ''


UNIONS = (types.UnionType, typing.Union)
INTEGERS = range(-(2**31), 2**31)  # steps and sizes are int32 in JAX


def within(value: float, allowed: str) -> bool:
  """Whether `value` lies in a range as configs write it: '>= low', '> low', or an interval.

  >>> within(1, '>= 1'), within(0, '> 0'), within(0, '[0, 1)'), within(1, '[0, 1)'), within(1, '(0, 1]')
  (True, False, True, False, True)
  """
  if allowed[0] == '>':
    sign, low = allowed.split()
    return value > float(low) or (sign == '>=' and value == float(low))
  low, high = (float(end) for end in allowed[1:-1].split(','))
  return low < value < high or (value == low and allowed[0] == '[') or (value == high and allowed[-1] == ']')


def without_none(args: tuple[Any, ...]) -> Any:
  """The union of `args` without None."""
  return functools.reduce(operator.or_, (a for a in args if a is not type(None)))


def join(key: str, name: str) -> str:
  return f'{key}.{name}' if key else name


def default_of(field: dataclasses.Field, base: Any) -> Any:
  """The value of a field in `base`, else its class's default, else MISSING."""
  if base is not None:
    return getattr(base, field.name)
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def sections(hint: Any) -> tuple[Any, ...]:
  """The dataclasses of a union, or the one that `hint` is."""
  return typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)


def is_section(hint: Any) -> bool:
  return all(dataclasses.is_dataclass(member) for member in sections(hint))


def name_of(schema: Any) -> str:
  """The `name` that picks this member of a union."""
  return typing.get_args(typing.get_type_hints(schema)['name'])[0]


def choices(names: Iterable[Any]) -> str:
  return ', '.join(repr(name) for name in names)
