"""Plans of large stores, kept in files: made once (by a run, or ahead by `pretrain data plan`), then read.

A plan is a pure function of a store and a config, so its file is a cache: it may be deleted at any time. Files are on
this host; with a URL, in a folder of an object store too, where other hosts find them.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data.errors import DataError
from data.packing.plan import Bins, Cuts, Pieces, Plan, Planner, Stream
from data.stores.arrays import has_file, read_file, write_file

VERSION = 2  # raise when the same arguments give other plans
LISTED = (*Pieces._fields[:-1], 'piece_tasks')  # names in a file, in which `tasks` has an entry for each row
LARGE = 2**20  # tokens of a store; smaller ones are planned faster than a file is read


@dataclasses.dataclass(frozen=True)
class PlanFiles:
  """Where plans are kept: in a folder of this host and, if there is a `url`, in that folder of an object store."""

  folder: pathlib.Path
  url: str | None = None


class KeptPlans:
  """A planner (packing/plan.py) that keeps what `planner` makes in `files`; `what` (JSON) is all it depends on.
  `stream(shard, variant)` is the text that it lays in rows."""

  def __init__(self, planner: Planner, stream: Callable[[int, int], Stream], files: PlanFiles, what: Any):
    self.variants, self._planner, self._stream = planner.variants, planner, stream
    name = hashlib.sha256(json.dumps([VERSION, what], sort_keys=True).encode()).hexdigest()[:16]
    self._folder, self._url = files.folder / name, files.url and f'{files.url}/{name}'

  def plan(self, shard: int, variant: int) -> Plan:
    name = _name(shard, variant)
    arrays = self._find(name)
    if arrays is None:
      plan = self._planner.plan(shard, variant)
      self._keep(name, _arrays(plan))
      return plan
    if 'cuts' in arrays:
      return Cuts(arrays['tasks'], arrays['cuts'], self._stream(shard, variant))
    return Bins(arrays['tasks'], arrays['firsts'], Pieces(*(arrays.get(name) for name in LISTED)))

  def counts(self, variant: int, count: Callable[[], np.ndarray]) -> np.ndarray:
    """int64[shards, tasks]: the result of `count`, which is called once for each variant."""
    name = f'{variant}-counts.npz'
    arrays = self._find(name)
    if arrays is None:
      arrays = {'counts': count()}
      self._keep(name, arrays)
    return arrays['counts']

  def share(self, shard: int, variant: int) -> None:
    """A plan that is on this host is in the store too."""
    self._upload(_name(shard, variant))

  def _find(self, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file of this host or, if it has none, of the store; then this host has a copy."""
    found = _read(self._folder / name)
    if found is None and self._url and (data := read_file(self._url, name)) is not None:
      found = _loaded(io.BytesIO(data), f'{self._url}/{name}')
      _write(self._folder / name, found)
    return found

  def _keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    _write(self._folder / name, arrays)
    self._upload(name)

  def _upload(self, name: str) -> None:
    if self._url and not has_file(self._url, name):  # other hosts make the same plan at the same time
      write_file(self._url, name, (self._folder / name).read_bytes())


def _name(shard: int, variant: int) -> str:
  return f'{variant}-{shard:05}.npz'


def _arrays(plan: Plan) -> Mapping[str, np.ndarray]:
  match plan:
    case Cuts(tasks, cuts):
      return {'tasks': tasks, 'cuts': cuts}
    case Bins(tasks, firsts, listed):
      own = {name: values for name, values in zip(LISTED, listed, strict=True) if values is not None}
      return {'tasks': tasks, 'firsts': firsts, **own}
    case _:
      raise TypeError(f'{type(plan).__name__} is no plan that is kept.')


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The arrays of a file; None if it does not exist."""
  try:
    with path.open('rb') as file:
      return _loaded(file, str(path))
  except FileNotFoundError:
    return None
  except OSError as error:
    raise DataError(f'{path} cannot be read ({error.strerror}); check the folder (PRETRAIN_CACHE).') from error


def _loaded(file: io.BufferedIOBase, place: str) -> dict[str, np.ndarray]:
  """The arrays of the file at `place`. Its checksums are the zip format's."""
  try:
    with np.load(file, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise DataError(f'{place} is damaged ({error}); delete it, it will be made again.', 'DATA-CORRUPT') from error


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """The whole file or none: it appears under its name when it is written. Any number of processes may do so at once."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}-{threading.get_ident()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open('wb') as file:
      np.savez(file, **arrays)
    temporary.replace(path)
  except OSError as error:
    raise DataError(
      f'{path} cannot be written ({error.strerror}); free space there, or set PRETRAIN_CACHE to another folder.'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()
