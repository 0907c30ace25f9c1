"""Gin's notation -> frozen dataclasses, and back to text. Configs hold values, code holds code."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from pretrain.config.gin_text import Binding, read_file, read_text
from pretrain.config.macros import check_used, expand, is_macro
from pretrain.config.schema import Builder
from pretrain.errors import ConfigError
from pretrain.workdirs.folder import as_folder

T = TypeVar('T')


def load(
  schema: type[T], files: Sequence[str], overrides: Sequence[str] = (), *, absent: Mapping[str, Any] | None = None
) -> T:
  """An instance of `schema` from gin files, then `key=value` overrides; the last binding of a key wins.

  `absent` has values for keys that neither binds, in place of the defaults of their classes.

  Raises ConfigError, naming file and line, for syntax errors and unknown, missing or mistyped keys.
  """
  bindings = [Binding(key, value, 'default') for key, value in (absent or {}).items()]
  bindings += [binding for file in files for binding in read_file(as_folder(file, '--gin_file'), '--gin_file=', ())]
  for override in overrides:
    name = '--gin.' + override.split('=', 1)[0].strip()
    bindings += read_text(override, pathlib.Path(), name, ())
  check_used(bindings)
  # A name without a dot in capitals is a macro; anything else is a key. Macros may be overridden, so they come first.
  macros = {b.key: b for b in bindings if is_macro(b.key)}
  keys = {b.key: b._replace(value=expand(b.value, macros, b.place)) for b in bindings if not is_macro(b.key)}
  places = {key: binding.place for key, binding in keys.items()}
  builder = Builder(places, files[-1] if files else 'the config', outdated(bindings))
  return builder.build(schema, nest(keys), '')


def outdated(bindings: Sequence[Binding]) -> frozenset[str]:
  """Keys of a section written only before another `name` was chosen for it: they may belong to the first choice.

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
  """Every value of a config dataclass by its dotted key; tuples of dataclasses become lists of dicts. A field that is
  rendered 'if set' is left out where it has its default: configs that do not use it stay as they were."""
  flat: dict[str, Any] = {}
  for field in dataclasses.fields(cfg):
    if not _is_rendered(field, cfg):
      continue
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
  default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
  return field.metadata.get('rendered') != 'if set' or getattr(value, field.name) != default


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
