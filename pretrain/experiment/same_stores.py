"""Whether two configs name the same data: token stores are compared by their contents, not by how a path is spelled.

Beside its config a run keeps `stores.json`: the folder it was started from, and the fingerprint of each store by its
path. So a run can be resumed from another folder, and with stores that were moved.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from data.batches.source import Source, StoreData, names_of
from data.errors import DataError
from data.stores.paths import is_local, local_path
from data.stores.store import open_store
from pretrain.config import bindings
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.saved import load_saved
from pretrain.workdirs.folder import Folder

FILE = 'stores.json'
_LISTS = ('data.sources', 'data.heldout')
Sources = tuple[Source, ...]


def record(cfg: Experiment) -> str:
  """The text of `stores.json`."""
  paths = dict.fromkeys(source.path for sources in _lists(cfg) for source in sources)
  found = {path: name for path in paths if (name := _fingerprint(path)) is not None}
  return json.dumps({'folder': os.getcwd(), 'stores': found}, indent=1) + '\n'


class Recorded:
  """What the run in `workdir` has recorded of its stores; a run of an older version has recorded nothing."""

  def __init__(self, workdir: Folder):
    try:
      read = json.loads((workdir / FILE).read_text())
      self._folder, self._stores = str(read['folder']), dict(read['stores'])
    except (OSError, ValueError, KeyError, TypeError):
      self._folder, self._stores = os.getcwd(), {}

  def fingerprint(self, path: str) -> str | None:
    return self._stores.get(path) or _fingerprint(self.resolved(path))

  def resolved(self, path: str) -> str:
    """A path of the run's config as this process finds it."""
    return os.path.join(self._folder, local_path(path)) if is_local(path) else path


def by_contents(cfg: Experiment, recorded: Recorded | None = None) -> Experiment:
  """`cfg` with fingerprints in the place of paths (and names) of stores, and the real path of initial weights: equal
  for equal data. A store that cannot be opened keeps its path."""
  fingerprint = recorded.fingerprint if recorded else _fingerprint
  change = lambda sources: tuple(
    dataclasses.replace(source, path=fingerprint(source.path) or source.path, name=None) for source in sources
  )
  initial = cfg.checkpoint.initial
  if initial is not None and is_local(initial):
    real = os.path.realpath(recorded.resolved(initial) if recorded else local_path(initial))
    cfg = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, initial=real))
  return _changed(cfg, change)


def as_begun(workdir: Folder, cfg: Experiment) -> Experiment:
  """`cfg` whose stores have the names that the run in `workdir` gave them, whatever their paths are now.

  Metrics, and positions in mixtures, are kept by these names.
  """
  try:
    before = load_saved(workdir / 'config.gin')
  except (OSError, ConfigError):  # a new run; or check_same_run refuses it
    return cfg
  recorded = Recorded(workdir)
  known: dict[str, list[str]] = {}
  for sources in _lists(before):
    for source, name in zip(sources, names_of(sources), strict=True):
      names = known.setdefault(recorded.fingerprint(source.path) or source.path, [])
      names += [name] * (name not in names)
  return _changed(cfg, lambda sources: _named(sources, known))


def _named(sources: Sources, known: dict[str, list[str]]) -> Sources:
  own, taken = names_of(sources), set[str]()
  found = []
  for source, name in zip(sources, own, strict=True):
    before = [old for old in known.get(_fingerprint(source.path) or source.path, ()) if old not in taken]
    kept = name if source.name or name in before or not before else before[0]
    taken.add(kept)
    found.append(source if kept == name else dataclasses.replace(source, name=kept))
  return tuple(found) if len(taken) == len(found) else sources


def _fingerprint(path: str) -> str | None:
  """The contents of a store; None where it cannot be opened."""
  try:
    return open_store(path).fingerprint
  except (DataError, OSError):
    return None


def _lists(cfg: Experiment) -> list[Sources]:
  """Each list of stores, those that phases set too."""
  found: list[Sources] = []
  _changed(cfg, lambda sources: found.append(sources) or sources)
  return found


def _changed(cfg: Experiment, change: Callable[[Sources], Sources]) -> Experiment:
  """`cfg` with `change` of each list of stores."""
  if isinstance(cfg.data, StoreData):
    data = dataclasses.replace(cfg.data, sources=change(cfg.data.sources), heldout=change(cfg.data.heldout))
    cfg = dataclasses.replace(cfg, data=data)
  phases = [dataclasses.replace(phase, set=_changed_set(phase.set, change)) for phase in cfg.phases]
  return dataclasses.replace(cfg, phases=tuple(phases))


def _changed_set(values: Any, change: Callable[[Sources], Sources]) -> dict[str, Any]:
  as_sources = lambda listed: tuple(Source(**one) if isinstance(one, dict) else one for one in listed)
  return {
    key: bindings.plain(change(as_sources(value))) if key in _LISTS and _is_list(value) else value
    for key, value in values.items()
  }


def _is_list(value: Any) -> bool:
  """Whether a phase gives a list of stores that can be read; what is wrong with another one is said elsewhere."""
  names = {field.name for field in dataclasses.fields(Source)}
  return isinstance(value, list | tuple) and all(
    isinstance(one, dict) and 'path' in one and one.keys() <= names and isinstance(one['path'], str) for one in value
  )
