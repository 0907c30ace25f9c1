"""Macros: `WIDTH = 8` in one line, `%WIDTH` as a value in others. A macro that no key uses is a mistake."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.config.gin_text import Binding, Macro, inside
from pretrain.config.other_stacks import instead_of
from pretrain.errors import ConfigError


def is_macro(key: str) -> bool:
  return '.' not in key and key.isupper()


def check_used(bindings: Sequence[Binding]) -> None:
  """Raises ConfigError for the first macro to which no key refers, in its value or through other macros.

  A key counts with each of its values, also those that later bindings replace: `--gin.model.embed=8` does not make a
  mistake of the file that has `model.embed = %WIDTH`.
  """
  used = set(_used(bindings))
  for name, _, place in bindings:
    if is_macro(name) and name not in used:
      raise ConfigError(f'{place}: no key uses the macro {name}; {_instead(name, used)}')


def _used(bindings: Sequence[Binding]) -> Iterator[str]:
  """The names of the macros in the values of keys, and of the macros in the values of those."""
  names = lambda value: {found.name for found in inside(value) if isinstance(found, Macro)}
  waiting = set().union(*(names(b.value) for b in bindings if not is_macro(b.key)))
  done: set[str] = set()
  while waiting:
    yield from waiting
    done |= waiting
    waiting = set().union(*(names(b.value) for b in bindings if b.key in waiting)) - done


def _instead(name: str, used: set[str]) -> str:
  if known := instead_of(name):
    return f'{known}.'
  if close := difflib.get_close_matches(name, sorted(used), 1):
    return f'did you mean {close[0]}?'
  return f'remove it, or use it: KEY = %{name}.'


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
